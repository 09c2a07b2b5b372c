// The fast path from Python to the loss: see eager_loss.cpp.
#pragma once

#include <Python.h>

namespace fused_bce {

// A table of one function
extern PyMethodDef kEagerLoss[];

}  // namespace fused_bce
