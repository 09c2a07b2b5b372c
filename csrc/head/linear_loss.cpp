// The loss of a linear layer's logits and its gradients, block of logits by block: the products are
// torch's, the loss and its gradient are the kernels', which write it over the logits.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ThreadLocalState.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <atomic>
#include <string>
#include <vector>

#include "../operands.h"
#include "linear_operands.h"
#include "logit_blocks.h"
#include "target_blocks.h"

namespace fused_bce {

using at::Tensor;

at::ScalarType LinearOperands::loss_dtype() const {
  const bool ones = offsets && !values;
  const at::ScalarType type = (values ? *values : target).scalar_type();
  return ones || is_integer(type) ? wide_dtype()
                                  : at::promoteTypes(wide_dtype(), at_least_float(type));
}

namespace {

// The CPU has no product of bfloat16 with a sum in float32. Each of so many products is rounded,
// their sum is not: with one alone, the result would be rounded twice.
constexpr int64_t kRoundedProducts = 8;

// Threads that take blocks of their own wait for each other once, not at the end of each product
// and each loss.
struct Sharing {
  int threads = 1;
  int64_t shares = 1;  // of the labels; which thread takes which is open
};

// So many, so that a thread that other work slows down takes fewer.
constexpr int64_t kSharesOfThread = 4;

// Each share has a sum of its own for the gradient of the input; they may need as much memory as
// the blocks. They are added up in order, so that bits do not depend on who took which. Nor do
// those of the loss depend on which gradients are wanted.
Sharing share_labels(const LinearOperands& o) {
  const int64_t rows = o.input.size(0), labels = o.linear_weight.size(0);
  const int threads = at::get_num_threads();
  if (!o.input.is_cpu() || threads == 1 || at::in_parallel_region() || labels < rows) return {};
  const auto size = static_cast<int64_t>(c10::elementSize(o.wide_dtype()));
  const int64_t bytes_of_sum = std::max<int64_t>(o.input.numel() * size, 1);
  const int64_t most = std::min(
      {kSharesOfThread * threads, labels / kLeastWidth, chunk_bytes_of(o, threads) / bytes_of_sum});
  // As many for each, or one would wait.
  if (const int64_t shares = most / threads * threads; shares > 1) return {threads, shares};
  return {};
}

// sum = alpha a b, or with more, sum += alpha a b, added up in the dtype of the sum. Of all that is
// added up, `terms` are those of one element.
void add_product(Tensor& sum, const Tensor& a, const Tensor& b, double alpha, bool more,
                 int64_t terms) {
  if (a.scalar_type() == sum.scalar_type()) {
    at::addmm_out(sum, sum, a, b, /*beta=*/more, alpha);
    return;
  }
  if (!more) sum.zero_();
  if (!sum.is_cpu()) {
    sum.add_(at::mm(a, b, sum.scalar_type()), alpha);
    return;
  }
  for_ranges(b.size(0), (terms + kRoundedProducts - 1) / kRoundedProducts, [&](Range some, bool) {
    sum.add_(at::mm(part(a, 1, some), part(b, 0, some)), alpha);
  });
}

class LinearLossCall {
 public:
  LinearLossCall(const LinearOperands& operands, Wanted wanted, const OptionalTensor& grad_loss)
      : device_(operands.input.device()),
        o_(operands),
        wanted_(wanted),
        sharing_(share_labels(o_)),
        blocks_(o_, sharing_.threads, sharing_.shares),
        targets_(o_, blocks_.block_rows(), blocks_.block_labels()),
        rows_(blocks_.rows()),
        labels_(blocks_.labels()),
        grad_loss_(grad_loss) {
    set_divisor();
    // What has no rows or labels gets no block.
    grad_bias_ = zeros({wanted_[2] ? labels_ : 0}, o_.wide_dtype());
    grad_weight_ = wanted_[1] ? allocate_like(o_.linear_weight, o_.linear_weight.scalar_type())
                              : at::empty({0}, o_.linear_weight.options());
    if (rows_ == 0) grad_weight_.zero_();
  }

  LinearLoss run() {
    std::vector<Sums> sums(static_cast<size_t>(sharing_.shares));
    std::atomic<int64_t> next{0};
    const auto work = [&] {
      Buffers buffers{blocks_.make_buffer(), targets_.make_buffer()};
      for (int64_t i; (i = next++) < sharing_.shares;)
        sums[static_cast<size_t>(i)] = add_up(share(i), buffers);
    };
    if (sharing_.shares == 1) {
      work();
    } else {
      const at::ThreadLocalState state;  // what is below autograd, and profiled
      at::parallel_for(0, sharing_.threads, 1, [&](int64_t, int64_t) {
        const at::ThreadLocalStateGuard same(state);
        work();
      });
    }
    return results(sums);
  }

 private:
  // What a thread has of its own
  struct Buffers {
    Tensor logits;
    TargetBlocks::Buffer target;
  };
  // Over a share of the labels
  struct Sums {
    Tensor loss, grad_input;
  };

  Tensor zeros(at::IntArrayRef sizes, at::ScalarType dtype) const {
    return at::zeros(sizes, o_.input.options().dtype(dtype));
  }

  bool any_wanted() const { return wanted_[0] || wanted_[1] || wanted_[2]; }

  // Labels of whole blocks
  Range share(int64_t i) const {
    const auto bound = [&](int64_t j) {
      const int64_t block = j * blocks_.parts_of_labels() / sharing_.shares;
      return std::min(block * blocks_.block_labels(), labels_);
    };
    return {bound(i), bound(i + 1) - bound(i)};
  }

  // Labels outside, so that a block of the weight is cast once, and that of its gradient is
  // complete before the next.
  Sums add_up(Range share, Buffers& buffers) {
    Sums sums{zeros({}, at::kDouble),
              zeros(wanted_[0] ? o_.input.sizes() : at::IntArrayRef({0}), o_.wide_dtype())};
    for_ranges(share.size, blocks_.block_labels(), [&](Range of_share, bool first_labels) {
      const Range labels{share.begin + of_share.begin, of_share.size};
      const Tensor weight = blocks_.weight(labels);
      Tensor grad_weight = grad_weight_sum(labels);
      for_ranges(rows_, blocks_.block_rows(), [&](Range rows, bool first_rows) {
        const Tensor block = blocks_.logits(buffers.logits, rows, labels, weight);
        sums.loss.add_(loss_of(block, targets_.block(buffers.target, rows, labels), rows, labels));
        if (wanted_[0]) {
          Tensor sum = part(sums.grad_input, 0, rows);
          add_product(sum, block, weight, grad_scale_, !first_labels, labels_);
        }
        if (wanted_[1])
          add_product(grad_weight, block.t(), blocks_.input(rows), grad_scale_, !first_rows, rows_);
        if (wanted_[2])
          part(grad_bias_, 0, labels).add_(at::sum(block, 0, false, o_.wide_dtype()), grad_scale_);
      });
      finish_grad_weight(labels, grad_weight);
    });
    return sums;
  }

  // As a factor of the products if the host knows it, else of what they give.
  void set_divisor() {
    if (o_.reduction != at::Reduction::Mean) return;
    host_divisor_ = static_cast<double>(rows_) * static_cast<double>(labels_);
    if (o_.divisor || o_.ignores()) {
      const Tensor given = o_.divisor ? o_.divisor->to(at::kDouble)
                                      : count_unignored(o_.target, o_.ignore_index, o_.ignore_nan);
      const Tensor divisor = given.masked_fill(given == 0, 1);
      host_divisor_ = divisor.is_cpu() ? divisor.item<double>() : 1;
      if (!divisor.is_cpu()) late_divisor_ = divisor;
    }
    grad_scale_ = 1 / host_divisor_;
  }

  static OptionalTensor part_of(const OptionalTensor& given, Range rows, Range labels) {
    if (!given || given->dim() == 0) return given;
    const Tensor weight = given->size(-1) == 1 ? *given : part(*given, -1, labels);
    return weight.dim() == 1 || weight.size(0) == 1 ? weight : part(weight, 0, rows);
  }

  // Leaves the gradient in the block of logits.
  Tensor loss_of(const Tensor& block, const Tensor& target, Range rows, Range labels) const {
    Operands o;
    o.options() = o_.options();
    o.logits = block;
    o.target = target;
    o.weight = part_of(o_.weight, rows, labels);
    o.pos_weight = part_of(o_.pos_weight, rows, labels);
    o.reduction = at::Reduction::Sum;
    o.dtype = at::kDouble;
    return any_wanted() ? forward_over_logits(o) : forward(o);
  }

  // Where the block's gradient is added up: in place, unless that would round each part of it.
  Tensor grad_weight_sum(Range labels) const {
    if (!wanted_[1]) return {};
    Tensor place = part(grad_weight_, 0, labels);
    const bool once =
        blocks_.block_rows() >= rows_ && blocks_.product_dtype() == place.scalar_type();
    if (!grad_loss_ && (once || place.scalar_type() == o_.wide_dtype())) return place;
    return at::empty(place.sizes(), place.options().dtype(o_.wide_dtype()));
  }

  void finish_grad_weight(Range labels, Tensor& sum) const {
    if (!wanted_[1] || rows_ == 0) return;
    if (grad_loss_) sum.mul_(*grad_loss_);
    if (late_divisor_.defined()) sum.div_(late_divisor_);
    const Tensor place = part(grad_weight_, 0, labels);
    if (!sum.is_alias_of(place)) place.copy_(sum);
  }

  LinearLoss results(std::vector<Sums>& shares) const {
    auto& [sum, grad_input] = shares[0];
    for (size_t i = 1; i < shares.size(); ++i) {
      sum.add_(shares[i].loss);
      grad_input.add_(shares[i].grad_input);
    }
    const Tensor loss = sum / host_divisor_;
    if (late_divisor_.defined())
      for (const Tensor& divided : {loss, grad_input, grad_bias_}) divided.div_(late_divisor_);
    return {loss.to(o_.loss_dtype()), grad_input, grad_weight_, grad_bias_};
  }

  c10::DeviceGuard device_;
  const LinearOperands& o_;
  Wanted wanted_;
  const Sharing sharing_;
  const LogitBlocks blocks_;
  const TargetBlocks targets_;
  int64_t rows_, labels_;
  OptionalTensor grad_loss_;
  double host_divisor_ = 1, grad_scale_ = 1;
  Tensor late_divisor_;
  Tensor grad_weight_, grad_bias_;
};

// fused_bce.functional has checked most of this and said more: see fused_bce/checks.py.
std::string misfit(const char* name, const Tensor& t, const LinearOperands& o) {
  const auto describe = [](const Tensor& operand) {
    return c10::str(operand.scalar_type(), " ", operand.sym_sizes(), " on ", operand.device());
  };
  return c10::str(name, " does not fit: it is ", describe(t), ", input ", describe(o.input),
                  ", linear_weight ", describe(o.linear_weight));
}

bool has_weight_sizes(const Tensor& t, const c10::SymInt& rows, const c10::SymInt& labels) {
  const auto is = [&](int64_t dim, const c10::SymInt& size) {
    return t.sym_size(dim) == size || t.sym_size(dim) == 1;
  };
  return t.dim() == 0 || (t.dim() == 1 && is(0, labels)) ||
         (t.dim() == 2 &&
          ((t.sym_size(0) == 1 && is(1, labels)) || (t.sym_size(1) == 1 && is(0, rows))));
}

void check_target(const LinearOperands& o, const c10::SymInt& rows, const c10::SymInt& labels) {
  TORCH_CHECK_VALUE(o.offsets || !o.values, "values go with offsets only");
  if (!o.offsets) {
    TORCH_CHECK_VALUE(o.target.sym_sizes() == c10::SymIntArrayRef({rows, labels}),
                      misfit("target", o.target, o));
    return;
  }
  TORCH_CHECK(o.target.dim() == 1 && at::isIntegralType(o.target.scalar_type(), false),
              misfit("target", o.target, o));
  TORCH_CHECK(o.offsets->scalar_type() == at::kLong && o.offsets->dim() == 1 &&
                  o.offsets->sym_size(0) == rows + 1,
              misfit("offsets", *o.offsets, o));
  TORCH_CHECK(!o.values || o.values->sym_sizes() == o.target.sym_sizes(),
              "values must be as many as label numbers");
  TORCH_CHECK_VALUE(!o.ignore_index && (!o.ignore_nan || o.values),
                    "with offsets goes no ignore_index, and ignore_nan with values only");
  // It would have to be told from the number of places that are not in the rows.
  TORCH_CHECK_VALUE(!o.ignore_nan || o.divisor || o.reduction != at::Reduction::Mean,
                    "the mean of sparse targets, some of them ignored, needs a divisor");
}

}  // namespace

void check_layer(const LinearOperands& o) {
  dtype_of("input", o.input.scalar_type());
  dtype_of("logits", o.logits_dtype());
  TORCH_CHECK_VALUE(o.chunk_bytes >= 0, "chunk_bytes must not be negative, as ", o.chunk_bytes);
  // Of another dtype it may be where all are cast.
  const auto is_of_layer = [&](const Tensor& t) {
    const at::ScalarType type = t.scalar_type();
    return t.device() == o.input.device() &&
           (o.dtype ? at::isFloatingType(type) : type == o.input.scalar_type());
  };
  const Tensor& weight = o.linear_weight;
  TORCH_CHECK(is_of_layer(weight) && o.input.dim() == 2 && weight.dim() == 2 &&
                  weight.sym_size(1) == o.input.sym_size(1),
              misfit("linear_weight", weight, o));
  const OptionalTensor& bias = o.linear_bias;
  TORCH_CHECK(
      !bias || (is_of_layer(*bias) && bias->dim() == 1 && bias->sym_size(0) == weight.sym_size(0)),
      misfit("linear_bias", *bias, o));
}

void check_linear(const LinearOperands& o, const OptionalTensor& grad_loss) {
  check_layer(o);
  TORCH_CHECK_VALUE(o.reduction == at::Reduction::Mean || o.reduction == at::Reduction::Sum,
                    "reduction must be mean or sum, not ", o.reduction);
  const auto check = [&](const char* name, const OptionalTensor& t, const auto& fits) {
    TORCH_CHECK(!t || fits(*t), misfit(name, *t, o));
  };
  const auto is_near = [&](const Tensor& t) { return t.device() == o.input.device(); };
  const auto is_near_or_number = [&](const Tensor& t) {
    return is_near(t) || (t.is_cpu() && t.dim() == 0);
  };
  const auto rows = o.input.sym_size(0), labels = o.linear_weight.sym_size(0);
  check("target", o.target, is_near);
  check("offsets", o.offsets, is_near);
  check("values", o.values, is_near);
  check_target(o, rows, labels);
  const auto is_weight = [&](const Tensor& t) {
    return is_near_or_number(t) && has_weight_sizes(t, rows, labels);
  };
  check("weight", o.weight, is_weight);
  check("pos_weight", o.pos_weight, is_weight);
  check("label_smoothing", o.label_smoothing, is_near_or_number);
  check("divisor", o.divisor, is_near_or_number);
  check("grad_loss", grad_loss, is_near_or_number);
}

LinearLoss linear_loss(const LinearOperands& operands, Wanted wanted,
                       const OptionalTensor& grad_loss) {
  check_linear(operands, grad_loss);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return LinearLossCall(operands, wanted, grad_loss).run();
}

}  // namespace fused_bce
