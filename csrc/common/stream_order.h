// Operations that share counters on the device follow each other, whatever streams they are called on.
#pragma once

namespace fp {

// Of the capture that `stream` is in; 0: none.
unsigned long long capture_id(void* stream);

class StreamOrder {
 public:
  // Called before each launch: one on another stream than the last waits for it; two streams in one capture are refused
  // (`what` is for the error). What graphs replay is the caller's to order.
  void follow(void* stream, const char* what);

 private:
  void* last_stream_ = nullptr;  // of the last launch that was not captured
  bool used_ = false;
  unsigned long long last_capture_ = 0;  // and of the last that was; 0: none
  void* last_captured_ = nullptr;
};

}  // namespace fp
