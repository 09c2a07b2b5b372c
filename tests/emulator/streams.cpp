// What csrc/cuda calls of CUDA's runtime: one device, with streams and graphs.
//
// Everything runs at once, unless a test holds it back: then each stream has a queue, and when the
// test lets them go, the streams take turns in an order drawn at random, a block at a time, so that
// kernels of several streams are under way together. Of what a stream is given while it is captured
// nothing runs before a replay.
#include <cuda_runtime.h>

#include <atomic>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "launched.h"

namespace emulator {
namespace {

// Does a part of some work; whether there is more.
using GoOn = std::function<bool()>;
// Begins it: once, or for each replay.
using Begin = std::function<GoOn()>;

struct Stream {
  std::deque<Begin> queue;
  GoOn running;
};

struct Device {
  std::mutex mutex;  // of all that follows
  std::map<cudaStream_t, Stream> streams;
  std::vector<std::vector<Begin>> graphs;
  cudaStream_t captured = nullptr;
  std::map<std::string, cudaError_t> failures;
  cudaError_t last_error = cudaSuccess;
};

Device& device() {
  static Device& d = *new Device;  // never destroyed: work may come while the process ends
  return d;
}

// Whether a test has asked for anything of the above. Else threads need not wait for each other.
std::atomic<bool> is_controlled{false}, holds_back{false};

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) device().last_error = error;
  return error;
}

// What a test has ordered for the next call of this function
cudaError_t failure_of(const char* function) {
  if (!is_controlled) return cudaSuccess;
  const std::lock_guard lock(device().mutex);
  const auto found = device().failures.extract(function);
  return found ? remember(found.mapped()) : cudaSuccess;
}

cudaError_t put(cudaStream_t stream, const Begin& begin) {
  if (is_controlled) {
    Device& d = device();
    const std::lock_guard lock(d.mutex);
    if (d.captured && stream == d.captured) {
      d.graphs.back().push_back(begin);
      return cudaSuccess;
    }
    // As CUDA has it of the default stream
    if (d.captured && !stream) return remember(cudaErrorStreamCaptureImplicit);
    if (holds_back) {
      d.streams[stream].queue.push_back(begin);
      return cudaSuccess;
    }
  }
  const GoOn go_on = begin();
  while (go_on()) {
  }
  return cudaSuccess;
}

// Whether anything was left to do
bool let_one_go_on(Device& d, std::mt19937& random) {
  std::vector<Stream*> busy;
  for (auto& [name, stream] : d.streams)
    if (stream.running || !stream.queue.empty()) busy.push_back(&stream);
  if (busy.empty()) return false;
  Stream& stream = *busy[random() % busy.size()];
  if (!stream.running) {
    stream.running = stream.queue.front()();
    stream.queue.pop_front();
  }
  if (!stream.running()) stream.running = nullptr;
  return true;
}

}  // namespace

void launch(unsigned blocks, unsigned threads, cudaStream_t stream, std::function<void()> kernel) {
  if (failure_of("cudaLaunchKernel") != cudaSuccess) return;
  put(stream, [=]() -> GoOn {
    auto launched = std::make_shared<Launched>(blocks, threads, kernel);
    return [=] { return launched->run_next_block(); };
  });
}

}  // namespace emulator

using namespace emulator;

extern "C" {

// For tests

void emulator_hold_back() { is_controlled = holds_back = true; }

void emulator_let_go(unsigned seed) {
  std::mt19937 random(seed);
  const std::lock_guard lock(device().mutex);
  while (let_one_go_on(device(), random)) {
  }
  holds_back = false;
}

void emulator_begin_capture(cudaStream_t stream) {
  is_controlled = true;
  device().captured = stream;
  device().graphs.emplace_back();
}

// The number of the graph
size_t emulator_end_capture() {
  device().captured = nullptr;
  return device().graphs.size() - 1;
}

void emulator_replay(size_t graph, cudaStream_t stream) {
  for (const Begin& begin : device().graphs[graph]) put(stream, begin);
}

// The next call of this function of the runtime returns that error.
void emulator_fail_next(const char* function, int error) {
  is_controlled = true;
  device().failures[function] = static_cast<cudaError_t>(error);
}

// CUDA's

cudaError_t cudaMemsetAsync(void* p, int value, size_t count, cudaStream_t stream) {
  if (const cudaError_t error = failure_of("cudaMemsetAsync")) return error;
  return put(stream, [=]() -> GoOn {
    return [=] {
      std::memset(p, value, count);
      return false;
    };
  });
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, const void*) {
  return failure_of("cudaFuncGetAttributes");
}

cudaError_t cudaGetLastError() {
  if (!is_controlled) return cudaSuccess;
  const std::lock_guard lock(device().mutex);
  return std::exchange(device().last_error, cudaSuccess);
}

const char* cudaGetErrorString(cudaError_t error) {
  thread_local std::string text;
  text = "CUDA error " + std::to_string(error);
  return text.c_str();
}
}
