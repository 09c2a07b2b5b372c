#include "device.h"

#include <c10/core/DeviceGuard.h>

#include <mutex>
#include <unordered_map>

#include "problem.h"

namespace fused_bce {

bool has_kernels_for(c10::Device device) {
  if (device.is_cpu()) return true;
  if constexpr (kHasCuda) {
    // Never destroyed: calls may come while the process ends.
    static auto& answers = *new std::unordered_map<c10::DeviceIndex, bool>;
    static std::mutex mutex;
    const std::lock_guard lock(mutex);
    auto answer = answers.find(device.index());
    if (answer == answers.end()) {
      const c10::DeviceGuard guard(device);
      answer = answers.emplace(device.index(), cuda_covers_current_device()).first;
    }
    return answer->second;
  }
  return false;
}

}  // namespace fused_bce
