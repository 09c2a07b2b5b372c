// The largest logits of each row and their labels, block of logits by block.
#include <ATen/Dispatch.h>
#include <ATen/NumericUtils.h>
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gather.h>
#include <ATen/ops/new_empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/where.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "linear_operands.h"
#include "logit_blocks.h"

namespace fused_bce {

using at::Tensor;

namespace {

LinearOperands layer_operands(const Tensor& input, const Tensor& linear_weight,
                              const OptionalTensor& linear_bias, OptionalDtype dtype,
                              int64_t chunk_bytes) {
  LinearOperands o;
  o.input = input;
  o.linear_weight = linear_weight;
  o.linear_bias = linear_bias;
  o.dtype = dtype;
  o.chunk_bytes = chunk_bytes;
  return o;
}

template <class T>
struct Candidate {
  T value;
  int64_t label;
};

// nan counts as the largest, as in torch.topk.
template <class T>
bool is_larger(T a, T b) {
  return a > b || (at::_isnan(a) && !at::_isnan(b));
}

template <class T>
bool comes_before(const Candidate<T>& a, const Candidate<T>& b) {
  if (is_larger(a.value, b.value)) return true;
  return !is_larger(b.value, a.value) && a.label < b.label;
}

// The k best of a row: a heap whose first element is the worst of them. Labels come in ascending
// order, so that of equal values those that are there stay.
template <class T>
class Best {
 public:
  void add(const T* values, Range labels, size_t k) {
    int64_t i = 0;
    for (; i < labels.size && heap_.size() < k; ++i) push({values[i], labels.begin + i});
    while (i < labels.size) {
      const int64_t end = std::min(i + kStride, labels.size);
      if (!may_have_larger(values + i, end - i)) {
        i = end;
        continue;
      }
      for (; i < end; ++i)
        if (is_larger(values[i], heap_.front().value)) {
          std::pop_heap(heap_.begin(), heap_.end(), comes_before<T>);
          heap_.pop_back();
          push({values[i], labels.begin + i});
        }
    }
  }

  void write(T* values, int64_t* labels) {
    std::sort_heap(heap_.begin(), heap_.end(), comes_before<T>);
    for (const Candidate<T>& candidate : heap_) {
      *values++ = candidate.value;
      *labels++ = candidate.label;
    }
  }

 private:
  static constexpr int64_t kStride = 64;

  void push(Candidate<T> candidate) {
    heap_.push_back(candidate);
    std::push_heap(heap_.begin(), heap_.end(), comes_before<T>);
  }

  // Without a branch for each value, as nearly all are smaller
  bool may_have_larger(const T* values, int64_t size) const {
    const T worst = heap_.front().value;
    bool any = false;
    for (int64_t i = 0; i < size; ++i) any |= !(values[i] <= worst);
    return any;
  }

  std::vector<Candidate<T>> heap_;
};

// The values of a block as keys that are all different, in the order of torch.topk and, of equal
// values, of falling labels.
Tensor order_keys(const Tensor& block) {
  const Tensor values = block.to(at::kFloat).add(0);  // -0 becomes 0
  const Tensor bits =
      values.masked_fill(values.isnan(), std::numeric_limits<double>::quiet_NaN()).view(at::kInt);
  const Tensor ascending = at::where(bits.ge(0), bits, bits.bitwise_xor(0x7fffffff));
  const Tensor places = at::arange(block.size(1) - 1, -1, -1, block.options().dtype(at::kLong));
  return ascending.to(at::kLong).mul_(int64_t{1} << 32).add_(places);
}

TopLogits topk_of_block(const Tensor& block, int64_t k) {
  k = std::min(k, block.size(1));
  Tensor labels;
  if (block.scalar_type() == at::kDouble)  // which leaves no bits for the label
    labels = std::get<1>(at::sort(block, /*stable=*/true, /*dim=*/1, /*descending=*/true))
                 .narrow(1, 0, k);
  else
    labels = std::get<1>(at::topk(order_keys(block), k, 1, /*largest=*/true, /*sorted=*/true));
  return {at::gather(block, 1, labels), labels};
}

// Of two lists, each in order, the labels of the second above those of the first
TopLogits merge(const TopLogits& a, const TopLogits& b, int64_t k) {
  auto [values, order] =
      at::sort(at::cat({std::get<0>(a), std::get<0>(b)}, 1), /*stable=*/true, /*dim=*/1,
               /*descending=*/true);
  k = std::min(k, values.size(1));
  const Tensor labels = at::cat({std::get<1>(a), std::get<1>(b)}, 1);
  return {values.narrow(1, 0, k), at::gather(labels, 1, order.narrow(1, 0, k))};
}

void check_topk(const LinearOperands& o, int64_t k) {
  check_layer(o);
  const auto labels = o.linear_weight.sym_size(0);
  TORCH_CHECK(k >= 0 && labels >= k, "k must lie between 0 and ", labels,
              ", the number of labels, not be ", k);
}

}  // namespace

TopLogits linear_topk(const Tensor& input, const Tensor& linear_weight,
                      const OptionalTensor& linear_bias, int64_t k, OptionalDtype dtype,
                      int64_t chunk_bytes) {
  const LinearOperands o = layer_operands(input, linear_weight, linear_bias, dtype, chunk_bytes);
  check_topk(o, k);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const LogitBlocks blocks(o);
  const Tensor buffer = blocks.make_buffer();
  Tensor values = at::empty({blocks.rows(), k}, input.options().dtype(blocks.product_dtype()));
  const Tensor labels = at::empty({blocks.rows(), k}, input.options().dtype(at::kLong));
  if (values.numel() == 0) return {values.to(o.logits_dtype()), labels};
  AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, values.scalar_type(), "linear_topk", [&] {
    std::vector<Best<scalar_t>> best(blocks.rows());
    for_ranges(blocks.labels(), blocks.block_labels(), [&](Range of, bool) {
      const Tensor weight = blocks.weight(of);
      for_ranges(blocks.rows(), blocks.block_rows(), [&](Range rows, bool) {
        const Tensor block = blocks.logits(buffer, rows, of, weight);
        const scalar_t* const data = block.const_data_ptr<scalar_t>();
        at::parallel_for(0, rows.size, 1, [&](int64_t begin, int64_t end) {
          for (int64_t row = begin; row < end; ++row)
            best[rows.begin + row].add(data + row * of.size, of, static_cast<size_t>(k));
        });
      });
    });
    for (int64_t row = 0; row < blocks.rows(); ++row)
      best[row].write(values.mutable_data_ptr<scalar_t>() + row * k,
                      labels.mutable_data_ptr<int64_t>() + row * k);
  });
  return {values.to(o.logits_dtype()), labels};
}

TopLogits linear_topk_composite(const Tensor& input, const Tensor& linear_weight,
                                const OptionalTensor& linear_bias, int64_t k, OptionalDtype dtype,
                                int64_t chunk_bytes) {
  const c10::DeviceGuard device(input.device());
  const LinearOperands o = layer_operands(input, linear_weight, linear_bias, dtype, chunk_bytes);
  check_topk(o, k);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const LogitBlocks blocks(o);
  const Tensor buffer = blocks.make_buffer();
  const auto options = input.options();
  std::vector<Tensor> values{at::empty({0, k}, options.dtype(blocks.product_dtype()))};
  std::vector<Tensor> labels{at::empty({0, k}, options.dtype(at::kLong))};
  for_ranges(blocks.rows(), blocks.block_rows(), [&](Range rows, bool) {
    TopLogits best{values[0].new_empty({rows.size, 0}), labels[0].new_empty({rows.size, 0})};
    for_ranges(blocks.labels(), blocks.block_labels(), [&](Range of, bool) {
      const Tensor block = blocks.logits(buffer, rows, of, blocks.weight(of));
      const auto [largest, places] = topk_of_block(block, k);
      best = merge(best, {largest, places + of.begin}, k);
    });
    values.push_back(std::get<0>(best));
    labels.push_back(std::get<1>(best));
  });
  return {at::cat(values).to(o.logits_dtype()), at::cat(labels)};
}

TopLogits linear_topk_meta(const Tensor& input, const Tensor& linear_weight,
                           const OptionalTensor& linear_bias, int64_t k, OptionalDtype dtype,
                           int64_t chunk_bytes) {
  const LinearOperands o = layer_operands(input, linear_weight, linear_bias, dtype, chunk_bytes);
  check_topk(o, k);
  const c10::SymInt sizes[] = {input.sym_size(0), k};
  return {at::empty_symint(sizes, input.options().dtype(o.logits_dtype())),
          at::empty_symint(sizes, input.options().dtype(at::kLong))};
}

}  // namespace fused_bce
