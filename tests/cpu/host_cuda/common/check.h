// csrc/common/check.h for the host: no call of the CUDA runtime is left.
#pragma once

#include <stdexcept>
#include <string>
