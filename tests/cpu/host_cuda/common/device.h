// csrc/common/device.h for the host. Three multiprocessors, unless a test sets others: rows are split over CTAs, but
// over few.
#pragma once

#include "common/check.h"

namespace fp {

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};
inline int multiprocessors = 3;
inline int multiprocessor_count(int) {
  return multiprocessors;
}
inline bool runs_hopper_code(int) {
  return true;
}

}  // namespace fp
