// Element types as the integers that Python passes; fused_parallel/_ext.py has the same numbers.
#pragma once

namespace fp {

enum class DType : int { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

}  // namespace fp
