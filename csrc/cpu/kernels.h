// The loop around the formula: tiles that fit in the first-level cache, brought to the arithmetic
// type where they are stored in another. Included like simd.h.
#pragma once

#include "storage.h"

constexpr int kTileBytes = 2048;
template <class T>
constexpr int kTile = kTileBytes / sizeof(T);

// One tile of every operand; null where absent. n is a multiple of the vector width.
template <class T>
struct Tile {
  int n;
  const T* logits;
  const T* target;
  const T* weight;
  const T* pos_weight;
  T* losses;
  T* grad_logits;
  T grad_scale;
};

// What a pass computes. kSum and kSumAndGrad return the sum of the losses.
enum class Pass { kSum, kSumAndGrad, kLosses, kGrad };

template <class T>
double sum_of_lanes(const Vec<T>& x) {
  double sum = 0;
  for (int k = 0; k < Vec<T>::kLanes; ++k) sum += x.v[k];
  return sum;
}

template <class T, Pass kPass, bool kHasWeight, bool kHasPosWeight>
double run_tile(const Tile<T>& tile) {
  using V = Vec<T>;
  // Several sums: short runs in T keep the rounding errors down, and the additions overlap.
  constexpr int kSums = 4;
  V sums[kSums] = {V(0), V(0), V(0), V(0)};
  // A copy, which no store can alias: it stays in registers.
  const Tile<T> t = tile;
  const V grad_scale(t.grad_scale);

  const auto step = [&](int i, V& sum) __attribute__((always_inline)) {
    const V pos_weight = kHasPosWeight ? V::load(t.pos_weight + i) : V(1);
    LossAndGrad<V> r =
        bce_with_logits<kHasPosWeight>(V::load(t.logits + i), V::load(t.target + i), pos_weight);
    if (kHasWeight) {
      const V weight = V::load(t.weight + i);
      r.loss = r.loss * weight;
      r.grad = r.grad * weight;
    }
    if (kPass == Pass::kSum || kPass == Pass::kSumAndGrad) sum = sum + r.loss;
    if (kPass == Pass::kLosses) r.loss.store(t.losses + i);
    if (kPass == Pass::kSumAndGrad || kPass == Pass::kGrad)
      (r.grad * grad_scale).store(t.grad_logits + i);
  };
  int i = 0;
  for (; i + kSums * V::kLanes <= t.n; i += kSums * V::kLanes)
    for (int k = 0; k < kSums; ++k) step(i + k * V::kLanes, sums[k]);
  for (; i < t.n; i += V::kLanes) step(i, sums[0]);

  double sum = 0;
  for (const V& s : sums) sum += sum_of_lanes(s);
  return sum;
}

template <class T>
using RunTile = double (*)(const Tile<T>&);

template <class T, Pass kPass>
RunTile<T> choose_weights(const Problem& p) {
  const bool weight = p.weight.data || p.grad_loss.data;
  if (p.pos_weight.data)
    return weight ? run_tile<T, kPass, true, true> : run_tile<T, kPass, false, true>;
  return weight ? run_tile<T, kPass, true, false> : run_tile<T, kPass, false, false>;
}

template <class T>
RunTile<T> choose_pass(const Problem& p) {
  if (!p.loss) return choose_weights<T, Pass::kGrad>(p);
  if (p.reduction == Reduction::kNone) return choose_weights<T, Pass::kLosses>(p);
  return p.grad_logits ? choose_weights<T, Pass::kSumAndGrad>(p) : choose_weights<T, Pass::kSum>(p);
}

template <class T>
void read_any(const void* data, DType dtype, int64_t at, int count, T padding, T* out) {
  switch (dtype) {
    case DType::kFloat16:
      return read(static_cast<const Float16*>(data) + at, count, padding, out);
    case DType::kBFloat16:
      return read(static_cast<const BFloat16*>(data) + at, count, padding, out);
    case DType::kFloat32:
      return read(static_cast<const float*>(data) + at, count, padding, out);
    case DType::kFloat64:  // only where the arithmetic is in double, too
      if constexpr (std::is_same_v<T, double>)
        return read(static_cast<const double*>(data) + at, count, padding, out);
  }
}

template <class T>
void write_any(const T* in, int count, DType dtype, int64_t at, void* data) {
  switch (dtype) {
    case DType::kFloat16:
      return write(in, count, static_cast<Float16*>(data) + at);
    case DType::kBFloat16:
      return write(in, count, static_cast<BFloat16*>(data) + at);
    case DType::kFloat32:
      return write(in, count, static_cast<float*>(data) + at);
    case DType::kFloat64:
      return write(in, count, static_cast<double*>(data) + at);
  }
}

template <class T>
constexpr DType kDTypeOf = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

// Reads a dense operand tile by tile: in place where the memory can be used as it is.
template <class T>
class DenseReader {
 public:
  DenseReader(Dense source, T padding) : source_(source), padding_(padding) {}

  const T* tile(int64_t begin, int count) {
    if (source_.dtype == kDTypeOf<T> && count % Vec<T>::kLanes == 0)
      return static_cast<const T*>(source_.data) + begin;
    read_any(source_.data, source_.dtype, begin, count, padding_, buffer_);
    return buffer_;
  }

 private:
  Dense source_;
  T padding_;
  alignas(kVectorBytes) T buffer_[kTile<T>];
};

// Reads a broadcast operand tile by tile. A short period is laid out once, two tiles long, and
// every tile points into it.
template <class T>
class BroadcastReader {
 public:
  explicit BroadcastReader(const Broadcast& source) : source_(source) {
    if (!source.data) return;
    if (source.inner <= kTile<T> && source.channels <= kTile<T> / source.inner) {
      period_ = source.channels * source.inner;
      expand(0, period_);
      for (int i = period_; i < 2 * kTile<T>; ++i) buffer_[i] = buffer_[i - period_];
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
      int run;
      if (source_.inner == 1 && source_.stride == 1) {
        run = static_cast<int>(std::min<int64_t>(source_.channels - channel, count - i));
        read_any(source_.data, source_.dtype, channel, run, T(0), buffer_ + i);
        channel += run;
      } else {
        run = static_cast<int>(std::min<int64_t>(source_.inner - skipped, count - i));
        T value[Vec<T>::kLanes] = {};
        read_any(source_.data, source_.dtype, channel * source_.stride, 1, T(0), value);
        std::fill_n(buffer_ + i, run, value[0]);
        skipped = 0;
        ++channel;
      }
      if (channel == source_.channels) channel = 0;
      i += run;
    }
  }

  Broadcast source_;
  int period_ = 0;
  alignas(kVectorBytes) T buffer_[2 * kTile<T>];
};

// The product of two factors, either of which may be absent.
template <class T>
const T* product(const T* a, const T* b, int count, T* out) {
  if (!a || !b) return a ? a : b;
  for (int i = 0; i < count; ++i) out[i] = a[i] * b[i];
  return out;
}

// Writes a dense result tile by tile: in place where the memory can be used as it is.
template <class T>
class DenseWriter {
 public:
  DenseWriter(void* data, DType dtype) : data_(data), dtype_(dtype) {}

  T* tile(int64_t begin, int count) {
    in_place_ = data_ && dtype_ == kDTypeOf<T> && count % Vec<T>::kLanes == 0;
    return in_place_ ? static_cast<T*>(data_) + begin : buffer_;
  }
  void finish(int64_t begin, int count) const {
    if (data_ && !in_place_) write_any(buffer_, count, dtype_, begin, data_);
  }

 private:
  void* data_;
  DType dtype_;
  bool in_place_ = false;
  alignas(kVectorBytes) T buffer_[kTile<T>];
};

template <class T>
double run_range(const Problem& p, int64_t begin, int64_t end) {
  const RunTile<T> run = choose_pass<T>(p);
  // Padding adds exactly nothing: the loss of (-inf, 0) is 0.
  DenseReader<T> logits(p.logits, -std::numeric_limits<T>::infinity());
  DenseReader<T> target(p.target, T(0));
  BroadcastReader<T> weight(p.weight), pos_weight(p.pos_weight), grad_loss(p.grad_loss);
  DenseWriter<T> losses(p.reduction == Reduction::kNone ? p.loss : nullptr, p.loss_dtype);
  DenseWriter<T> grad_logits(p.grad_logits, p.logits.dtype);
  alignas(kVectorBytes) T factors[kTile<T>];

  double sum = 0;
  for (int64_t i = begin; i < end; i += kTile<T>) {
    const int count = static_cast<int>(std::min<int64_t>(kTile<T>, end - i));
    Tile<T> tile;
    tile.n = (count + Vec<T>::kLanes - 1) / Vec<T>::kLanes * Vec<T>::kLanes;
    tile.logits = logits.tile(i, count);
    tile.target = target.tile(i, count);
    tile.weight = product(weight.tile(i, count), grad_loss.tile(i, count), tile.n, factors);
    tile.pos_weight = pos_weight.tile(i, count);
    tile.losses = losses.tile(i, count);
    tile.grad_logits = grad_logits.tile(i, count);
    tile.grad_scale = static_cast<T>(p.grad_scale);
    sum += run(tile);
    losses.finish(i, count);
    grad_logits.finish(i, count);
  }
  return sum;
}

double run(const Problem& p, int64_t begin, int64_t end) {
  return computes_in_double(p) ? run_range<double>(p, begin, end) : run_range<float>(p, begin, end);
}
