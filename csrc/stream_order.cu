#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "common/check.h"
#include "common/stream_order.h"

namespace fp {

unsigned long long capture_id(void* stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  unsigned long long capture = 0;
  FP_CUDA_CHECK(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture));
  return status == cudaStreamCaptureStatusActive ? capture : 0;
}

void StreamOrder::follow(void* stream, const char* what) {
  const cudaStream_t now = static_cast<cudaStream_t>(stream), last = static_cast<cudaStream_t>(last_stream_);
  const unsigned long long capture = capture_id(stream);
  if (capture != 0) {
    if (capture == last_capture_ && now != static_cast<cudaStream_t>(last_captured_)) {
      throw std::runtime_error(std::string("two ") + what +
                               " are captured in one CUDA graph on different streams; they share counters and must "
                               "follow each other: put them on one stream");
    }
    last_capture_ = capture;
    last_captured_ = stream;
    return;
  }
  if (used_ && now != last) {
    // The operations before run to their end first.
    cudaEvent_t event;
    FP_CUDA_CHECK(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
    const cudaError_t recorded = cudaEventRecord(event, last);
    const cudaError_t waited = recorded == cudaSuccess ? cudaStreamWaitEvent(now, event, 0) : recorded;
    cudaEventDestroy(event);  // kept by the driver until the wait is done
    FP_CUDA_CHECK(waited);
  }
  used_ = true;
  last_stream_ = stream;
}

}  // namespace fp
