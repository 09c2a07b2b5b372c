// The loop around the formula: tiles that fit in the first-level cache, brought to the arithmetic
// type where they are stored in another. Included like simd.h.
#pragma once

#include "storage.h"

constexpr int kTileBytes = 2048;
template <class T>
constexpr int kTile = kTileBytes / sizeof(T);

// One tile of every operand, logits and target as they are stored; null where absent. n is a
// multiple of the vector width.
template <class T, class L, class S>
struct Tile {
  int n;
  const L* logits;
  const S* target;
  const T* weight;
  const T* pos_weight;
  T* losses;
  L* grad_logits;
  T grad_scale;
  T ignore_index, target_scale, target_shift;
  bool ignore_nan;
};

template <class T>
double sum_of_lanes(const Vec<T>& x) {
  double sum = 0;
  for (int k = 0; k < Vec<T>::kLanes; ++k) sum += x.v[k];
  return sum;
}

// Two vectors at once, of operands whose types are halves.
template <Pass kPass, class Formula, class S>
FUSED_BCE_INLINE void step_of_halves(const Formula& formula, const S* logits, const S* target,
                                     FloatVec grad_scale, S* grad_logits, FloatVec& sum) {
  const FloatVec one(1);
  const Halves x = widen_halves(logits), y = widen_halves(target);
  const auto even = formula.template evaluate<false>(x.even, y.even, one);
  const auto odd = formula.template evaluate<false>(x.odd, y.odd, one);
  if (has_sum(kPass)) sum = sum + even.loss + odd.loss;
  if (has_grad(kPass)) narrow_halves({even.grad * grad_scale, odd.grad * grad_scale}, grad_logits);
}

template <Pass kPass, bool kHasWeight, bool kHasPosWeight, bool kHasExtras, class Formula, class T,
          class L, class S>
double run_tile(const Formula& formula, const Tile<T, L, S>& tile) {
  using V = Vec<T>;
  // Copies, which no store can alias: they stay in registers.
  const Tile<T, L, S> t = tile;
  const Formula f = formula;
  const V grad_scale(t.grad_scale);

  const auto step = [&](int i, V& sum) __attribute__((always_inline)) {
    const V pos_weight = kHasPosWeight ? V::load(t.pos_weight + i) : V(1);
    const V given = widen(t.target + i);
    const V target = kHasExtras ? fma(given, V(t.target_scale), V(t.target_shift)) : given;
    LossAndGrad<V> r = f.template evaluate<kHasPosWeight>(widen(t.logits + i), target, pos_weight);
    if (kHasWeight) {
      const V weight = V::load(t.weight + i);
      r.loss = r.loss * weight;
      r.grad = r.grad * weight;
    }
    if (kHasExtras) {
      const auto equal = given == V(t.ignore_index);
      const auto ignored = t.ignore_nan ? equal | (given != given) : equal;
      r.loss = select(ignored, V(0), r.loss);
      r.grad = select(ignored, V(0), r.grad);
    }
    if (has_sum(kPass)) sum = sum + r.loss;
    if (has_losses(kPass)) r.loss.store(t.losses + i);
    if (has_grad(kPass)) narrow(r.grad * grad_scale, t.grad_logits + i);
  };
  constexpr bool kInOrder = kHasWeight || kHasPosWeight || has_losses(kPass);

  // Short runs in T keep the rounding errors down.
  constexpr int kRun = kTile<T> / 4;
  V sum(0);
  for (int i = 0; i < t.n;) {
    const int end = std::min(i + kRun, t.n);
    V run(0);
    if constexpr (kAreHalves<L, S> && !kInOrder)
      for (; i + 2 * V::kLanes <= end; i += 2 * V::kLanes)
        step_of_halves<kPass>(f, t.logits + i, t.target + i, grad_scale, t.grad_logits + i, run);
    for (; i < end; i += V::kLanes) step(i, run);
    sum = sum + run;
  }
  return sum_of_lanes(sum);
}

template <class Formula, class T, class L, class S>
using RunTile = double (*)(const Formula&, const Tile<T, L, S>&);

template <Pass kPass, class Formula, class T, class L, class S>
RunTile<Formula, T, L, S> choose_weights(const Problem& p) {
  constexpr bool kPosWeight = Formula::kTakesPosWeight;
  if constexpr (std::is_same_v<L, T> && std::is_same_v<S, T>)
    if (has_extras(p)) return run_tile<kPass, true, kPosWeight, true, Formula, T, L, S>;
  const bool weight = p.weight.data || (p.grad_loss.data && folds_grad_loss(p));
  if constexpr (kPosWeight)
    if (p.pos_weight.data)
      return weight ? run_tile<kPass, true, true, false, Formula, T, L, S>
                    : run_tile<kPass, false, true, false, Formula, T, L, S>;
  return weight ? run_tile<kPass, true, false, false, Formula, T, L, S>
                : run_tile<kPass, false, false, false, Formula, T, L, S>;
}

template <class Formula, class T, class L, class S>
RunTile<Formula, T, L, S> choose_pass(const Problem& p) {
  switch (pass_of(p)) {
    case Pass::kSum:
      return choose_weights<Pass::kSum, Formula, T, L, S>(p);
    case Pass::kSumAndGrad:
      return choose_weights<Pass::kSumAndGrad, Formula, T, L, S>(p);
    case Pass::kLosses:
      return choose_weights<Pass::kLosses, Formula, T, L, S>(p);
    case Pass::kLossesAndGrad:
      return choose_weights<Pass::kLossesAndGrad, Formula, T, L, S>(p);
    case Pass::kGrad:
      break;
  }
  return choose_weights<Pass::kGrad, Formula, T, L, S>(p);
}

// One stored number as a T: dtypes that are not converted by vectors.
template <class T>
T number(Boolean stored) {
  return stored.byte != 0;
}
template <class T, class Integer>
T number(Integer stored) {
  return static_cast<T>(stored);
}

template <class T, class S>
void read_numbers(const S* p, int count, T* out) {
  for (int i = 0; i < count; ++i) out[i] = number<T>(p[i]);
}
// Through their low halves where these are all of them: few processors have more for vectors.
template <class T>
void read_numbers(const int64_t* p, int count, T* out) {
  uint64_t beyond = 0;
  for (int i = 0; i < count; ++i) beyond |= (static_cast<uint64_t>(p[i]) + 0x80000000) >> 32;
  if (beyond == 0)
    for (int i = 0; i < count; ++i) out[i] = static_cast<T>(static_cast<int32_t>(p[i]));
  else
    for (int i = 0; i < count; ++i) out[i] = static_cast<T>(p[i]);
}

template <class T>
void read_any(const void* data, DType dtype, int64_t at, int count, T padding, T* out) {
  with_dtype<SimdHalf>(dtype, [=](auto tag) {
    using S = decltype(tag);
    const S* const p = static_cast<const S*>(data) + at;
    if constexpr (std::is_integral_v<S> || std::is_same_v<S, Boolean>) {
      read_numbers(p, count, out);
      for (int i = count; i % Vec<T>::kLanes != 0; ++i) out[i] = padding;
    } else if constexpr (!(std::is_same_v<S, double> && std::is_same_v<T, float>)) {
      read(p, count, padding, out);  // float64 only where the arithmetic is in double, too
    }
  });
}

template <class T>
void write_any(const T* in, int count, DType dtype, int64_t at, void* data) {
  with_float<SimdHalf>(dtype,
                       [=](auto tag) { write(in, count, static_cast<decltype(tag)*>(data) + at); });
}

// Reads a dense operand tile by tile, for an arithmetic in T: in place where the memory can be used
// as it is, else converted to S or filled up to whole vectors.
template <class T, class S>
class DenseReader {
 public:
  DenseReader(Dense source, S padding, S* buffer)
      : source_(source), padding_(padding), buffer_(buffer) {}

  const S* tile(int64_t begin, int count) {
    const bool stored_as_s = source_.dtype == kDTypeOf<S>;
    const S* const stored = static_cast<const S*>(source_.data) + begin;
    if (stored_as_s && count % Vec<T>::kLanes == 0) return stored;
    if constexpr (std::is_same_v<S, T>) {
      read_any(source_.data, source_.dtype, begin, count, padding_, buffer_);
    } else {
      std::memcpy(buffer_, stored, count * sizeof(S));
      for (int i = count; i % Vec<T>::kLanes != 0; ++i) buffer_[i] = padding_;
    }
    return buffer_;
  }

 private:
  Dense source_;
  S padding_;
  S* buffer_;
};

template <class T>
struct BroadcastBuffers {
  alignas(kVectorBytes) T tiles[2 * kTile<T>];
  T values[kTile<T> + Vec<T>::kLanes];
};

// Reads a broadcast operand tile by tile. A short period is laid out once, two tiles long, and
// every tile points into it.
template <class T>
class BroadcastReader {
 public:
  BroadcastReader(const Broadcast& source, BroadcastBuffers<T>& buffers)
      : source_(source), buffer_(buffers.tiles), values_(buffers.values) {
    if (!source.data) return;
    if (source.inner <= kTile<T> && source.channels <= kTile<T> / source.inner) {
      period_ = static_cast<int>(source.channels * source.inner);
      expand(0, period_);
      // Doubled each time: element by element a short period would wait for its own stores.
      for (int filled = period_, n; filled < 2 * kTile<T>; filled += n) {
        n = std::min(filled, 2 * kTile<T> - filled);
        std::copy_n(buffer_, n, buffer_ + filled);
      }
    }
  }

  const T* tile(int64_t begin, int count) {
    if (!source_.data) return nullptr;
    const bool whole = count % Vec<T>::kLanes == 0;
    if (period_ && whole) return buffer_ + begin % period_;
    const int64_t channel = begin % source_.channels;
    if (source_.dtype == kDTypeOf<T> && source_.inner == 1 && source_.stride == 1 && whole &&
        channel + count <= source_.channels)
      return static_cast<const T*>(source_.data) + channel;
    // Only the last tile of all is not whole, after which the laid out period may go.
    expand(begin, count);
    for (int i = count; i % Vec<T>::kLanes != 0; ++i) buffer_[i] = 0;
    return buffer_;
  }

 private:
  // buffer_[0, count) = the operand along [begin, begin + count)
  void expand(int64_t begin, int count) {
    int64_t channel = begin / source_.inner % source_.channels;
    int64_t skipped = begin % source_.inner;
    for (int i = 0; i < count;) {
      const int64_t wanted = (skipped + count - i + source_.inner - 1) / source_.inner;
      const int n = static_cast<int>(std::min(source_.channels - channel, wanted));
      if (source_.inner == 1) {
        read_channels(channel, n, buffer_ + i);
        i += n;
      } else {
        read_channels(channel, n, values_);
        for (int k = 0; k < n; ++k, skipped = 0) {
          const int run = static_cast<int>(std::min<int64_t>(source_.inner - skipped, count - i));
          std::fill_n(buffer_ + i, run, values_[k]);
          i += run;
        }
      }
      channel = (channel + n) % source_.channels;
    }
  }

  // May write up to a vector beyond the n values.
  void read_channels(int64_t channel, int n, T* out) {
    if (source_.stride == 1) return read_any(source_.data, source_.dtype, channel, n, T(0), out);
    for (int k = 0; k < n; ++k)
      read_any(source_.data, source_.dtype, (channel + k) * source_.stride, 1, T(0), out + k);
  }

  Broadcast source_;
  int period_ = 0;
  T* buffer_;
  T* values_;
};

// The product of two factors, either of which may be absent.
template <class T>
const T* product(const T* a, const T* b, int count, T* out) {
  if (!a || !b) return a ? a : b;
  for (int i = 0; i < count; ++i) out[i] = a[i] * b[i];
  return out;
}

// Writes a dense result of S tile by tile: in place where the memory can be used as it is.
template <class T, class S>
class DenseWriter {
 public:
  DenseWriter(void* data, DType dtype, S* buffer) : data_(data), dtype_(dtype), buffer_(buffer) {}

  S* tile(int64_t begin, int count) {
    in_place_ = data_ && dtype_ == kDTypeOf<S> && count % Vec<T>::kLanes == 0;
    return in_place_ ? static_cast<S*>(data_) + begin : buffer_;
  }
  void finish(int64_t begin, int count) const {
    if (!data_ || in_place_) return;
    if constexpr (std::is_same_v<S, T>)
      write_any(buffer_, count, dtype_, begin, data_);
    else
      std::memcpy(static_cast<S*>(data_) + begin, buffer_, count * sizeof(S));
  }

 private:
  void* data_;
  DType dtype_;
  bool in_place_ = false;
  S* buffer_;
};

template <class T, class L, class S>
struct Buffers {
  alignas(kVectorBytes) L logits[kTile<T>];
  alignas(kVectorBytes) S target[kTile<T>];
  BroadcastBuffers<T> weight, pos_weight, grad_loss;
  alignas(kVectorBytes) T factors[kTile<T>];
  alignas(kVectorBytes) T losses[kTile<T>];
  alignas(kVectorBytes) L grad_logits[kTile<T>];
};

// Uninitialised; valid until the thread's next call.
template <class B>
B& make_buffers() {
  static_assert(sizeof(B) <= kScratchBytes && alignof(B) <= kScratchAlignment);
  return *new (thread_scratch()) B;
}

// T is the type of the arithmetic. L and S are those in which logits and target are read: their
// own, or T, to which any other is converted tile by tile.
template <class T, class L, class S, class Formula>
double run_range(const Formula& formula, const Problem& p, int64_t begin, int64_t end) {
  const auto run = choose_pass<Formula, T, L, S>(p);
  // With extras there is a weight always.
  static constexpr T kOne = 1;
  const Broadcast one{&kOne, kDTypeOf<T>};
  const bool extras = has_extras(p);
  // Padding adds exactly nothing: the loss of (-inf, 0) is 0; a smoothed target is not, but there
  // the padded weight is.
  auto& buffers = make_buffers<Buffers<T, L, S>>();
  DenseReader<T, L> logits(p.logits, extras ? L{} : kMinusInfinity<L>, buffers.logits);
  DenseReader<T, S> target(p.target, S{}, buffers.target);
  BroadcastReader<T> weight(extras && !p.weight.data ? one : p.weight, buffers.weight);
  BroadcastReader<T> pos_weight(extras && !p.pos_weight.data ? one : p.pos_weight,
                                buffers.pos_weight);
  BroadcastReader<T> grad_loss(folds_grad_loss(p) ? p.grad_loss : Broadcast{}, buffers.grad_loss);
  DenseWriter<T, T> losses(has_losses(pass_of(p)) ? p.loss : nullptr, p.loss_dtype, buffers.losses);
  DenseWriter<T, L> grad_logits(p.grad_logits, p.logits.dtype, buffers.grad_logits);

  double sum = 0;
  for (int64_t i = begin; i < end; i += kTile<T>) {
    const int count = static_cast<int>(std::min<int64_t>(kTile<T>, end - i));
    Tile<T, L, S> tile;
    tile.n = (count + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
    tile.logits = logits.tile(i, count);
    tile.target = target.tile(i, count);
    tile.weight = product(weight.tile(i, count), grad_loss.tile(i, count), tile.n, buffers.factors);
    tile.pos_weight = pos_weight.tile(i, count);
    tile.losses = losses.tile(i, count);
    tile.grad_logits = grad_logits.tile(i, count);
    tile.grad_scale = static_cast<T>(1 / p.divisor);
    tile.ignore_index = static_cast<T>(p.ignored.index);
    tile.ignore_nan = p.ignored.nan;
    tile.target_scale = static_cast<T>(p.target_scale);
    tile.target_shift = static_cast<T>(p.target_shift);
    sum += run(formula, tile);
    losses.finish(i, count);
    grad_logits.finish(i, count);
  }
  return sum;
}

// Half types are read as they are by cross entropy, whose arithmetic is short beside a conversion;
// everything else is brought to the arithmetic's type.
template <class Formula>
double run_any(const Formula& formula, const Problem& p, int64_t begin, int64_t end) {
  if (computes_in_double(p)) return run_range<double, double, double>(formula, p, begin, end);
  if constexpr (std::is_same_v<Formula, BinaryCrossEntropy>) {
    const bool alike = p.logits.dtype == p.target.dtype;
    if (!has_extras(p) && p.logits.dtype == DType::kBFloat16)
      return alike ? run_range<float, BFloat16, BFloat16>(formula, p, begin, end)
                   : run_range<float, BFloat16, float>(formula, p, begin, end);
    if (!has_extras(p) && p.logits.dtype == DType::kFloat16)
      return alike ? run_range<float, Float16, Float16>(formula, p, begin, end)
                   : run_range<float, Float16, float>(formula, p, begin, end);
  }
  return run_range<float, float, float>(formula, p, begin, end);
}

template <class L>
void scale_range(const Scaling& s, int64_t begin, int64_t end) {
  using C = std::conditional_t<std::is_same_v<L, double>, double, float>;
  using V = Vec<C>;
  BroadcastReader<C> grad_loss(s.grad_loss, make_buffers<BroadcastBuffers<C>>());
  const auto scaled = [zero_stays = s.zero_stays](V grad, V factor) __attribute__((always_inline)) {
    const V product = grad * factor;
    return zero_stays ? select(grad == V(0), grad, product) : product;
  };
  for (int64_t i = begin; i < end; i += kTile<C>) {
    const int count = static_cast<int>(std::min<int64_t>(kTile<C>, end - i));
    const C* const factors = grad_loss.tile(i, count);
    L* const grads = static_cast<L*>(s.grad_logits) + i;
    int k = 0;
    for (; k + V::kLanes <= count; k += V::kLanes)
      narrow(scaled(widen(grads + k), V::load(factors + k)), grads + k);
    if (k == count) continue;
    C rest[V::kLanes];
    read(grads + k, count - k, C(0), rest);
    scaled(V::load(rest), V::load(factors + k)).store(rest);
    write(rest, count - k, grads + k);
  }
}

void scale(const Scaling& s, int64_t begin, int64_t end) {
  with_float<SimdHalf>(s.dtype, [&](auto tag) { scale_range<decltype(tag)>(s, begin, end); });
}

double run(const Problem& p, int64_t begin, int64_t end) {
  const double sum =
      with_formula(p, [&](const auto& formula) { return run_any(formula, p, begin, end); });
  // While the chunk is in the cache.
  if (p.grad_loss.data && !folds_grad_loss(p)) scale(scaling_of(p), begin, end);
  return sum;
}
