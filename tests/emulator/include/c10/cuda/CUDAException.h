// In the place of torch's header, which a torch without CUDA lacks.
#pragma once

#define C10_CUDA_CHECK(call) static_cast<void>(call)
