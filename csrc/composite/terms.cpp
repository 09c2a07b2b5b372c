#include "terms.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/TracerMode.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/clamp_max.h>
#include <ATen/ops/rsub.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softplus.h>

#include <limits>

namespace fused_bce {

using at::Tensor;

namespace {

// Whether masks are needed for what is infinite or underflows. In eager mode on the CPU, where such
// a mask takes as long as three logarithms, the logits are asked first.
bool any_may_be_extreme(const Tensor& logits) {
  const bool readable = logits.is_cpu() && logits.sym_numel() > 0 &&
                        !at::isTensorSubclassLike(logits) &&
                        !at::tracer::impl::is_dispatch_enabled();
  return !readable || !(logits.abs().amax().item<double>() < 87);  // exp(-87) is a normal number
}

}  // namespace

Tensor away_from_0(const Tensor& base) {
  const double smallest = base.scalar_type() == at::kDouble ? std::numeric_limits<double>::min()
                                                            : std::numeric_limits<float>::min();
  return base.masked_fill(base.abs() < smallest, smallest);
}

// By default torch takes x for it from 20 on, which is off by 1e-10 of x.
Tensor exact_softplus(const Tensor& x) { return at::softplus(x, 1, 40); }

LogisticTerms::LogisticTerms(const Operands& o) : x(logits_of(o)), t(smoothed_target_of(o)) {
  may_be_extreme = any_may_be_extreme(x.detach());
  // No comparison: on the CPU a mask costs as much as ten products.
  side = at::rsub(x.detach().sign(), -0.5).sign();
  b = x * side;
  // t for a negative logit, else 1 - t, to the last bit
  q = at::addcmul(t, at::clamp_max(side, 0), at::rsub(t, 1, 2), -1);
  // The loss of an infinite logit on the side of its target is 0.
  if (may_be_extreme) b = b.masked_fill((q == 0).logical_and(b.isinf()), kVanishing);
  ce = at::addcmul(at::softplus(b), b, q, -1);
  // A constant far out, where a product with an infinite ce has no slope
  c = at::sigmoid(may_be_extreme ? b.clamp_min(kVanishing) : b);
}

Tensor vanishing_product(const Tensor& x, const Tensor& y) {
  return x * y.masked_fill((x == 0).logical_and(y.isinf()), 0);
}

Tensor bounded(const Tensor& logits) { return logits.clamp(kVanishing, -kVanishing); }

Tensor LogisticTerms::product(const Tensor& power, const Tensor& loss) const {
  return may_be_extreme ? vanishing_product(power, loss) : power * loss;
}

Tensor LogisticTerms::finite_ce() const {
  return may_be_extreme ? ce.masked_fill(b.isinf(), 0) : ce;
}

}  // namespace fused_bce
