// The GPU: a fibre for each thread of a block, and what they wait for.
//
// The thread sanitizer sees each fibre as a thread of its own, ordered after the launch, before its
// end, and by nothing else than barriers, and fences beside atomic operations, as in the memory
// model of PTX: a fence before an atomic operation releases, one after it acquires. So blocks that
// run one after the other here race if they could on a GPU.
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "launched.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define IF_TSAN(statement) statement
#else
#define IF_TSAN(statement)
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define IF_ASAN(statement) statement
#else
#define IF_ASAN(statement)
#endif

namespace emulator {
namespace {

constexpr unsigned kWarp = 32;
// The address sanitizer makes frames of 69 KB in float64.
constexpr size_t kStack = 96 << 10;

enum class State { kRuns, kWaitsForBlock, kWaitsForWarp, kDone };

// Where a fibre or the scheduler goes on. swapcontext makes a system call each time, and under the
// address sanitizer these took a third of the time.
using Point = void* [5];

struct Fibre {
  Place place;
  State state = State::kRuns;
  double given = 0;  // to the warp
  bool fenced = false;
  void* last_atomic = nullptr;
  char* stack = nullptr;
  ucontext_t start;
  bool has_started = false;
  Point point;
  void* asan = nullptr;
  void* tsan = nullptr;
};

}  // namespace

struct Block {
  std::vector<Fibre> fibres;
  std::shared_ptr<char[]> stacks;
  const std::function<void()>* kernel = nullptr;
  Point scheduler;
  void* asan = nullptr;
  const void* asan_stack = nullptr;
  size_t asan_size = 0;
  void* tsan = nullptr;
  char barrier = 0;  // its address, for the thread sanitizer
};

namespace {

thread_local Block* block = nullptr;
thread_local Fibre* fibre = nullptr;

const int seed = [] {
  const char* given = std::getenv("EMULATOR_SEED");
  return given ? std::atoi(given) : 0;
}();

// What switches is no business of the address sanitizer, which before each jump would forget what
// it knows of the stack, with a system call.
#define SWITCHES EMULATOR_UNSEEN __attribute__((noipa, no_sanitize("address", "undefined")))

// In a function of its own, as GCC wants it
SWITCHES void jump(Point& to) { __builtin_longjmp(to, 1); }

// Back to the scheduler, until that goes on with this fibre.
SWITCHES void leave(State state) {
  Block& b = *block;
  Fibre& f = *fibre;
  f.state = state;
  IF_TSAN(__tsan_switch_to_fiber(b.tsan, __tsan_switch_to_fiber_no_sync));
  IF_ASAN(__sanitizer_start_switch_fiber(state == State::kDone ? nullptr : &f.asan, b.asan_stack,
                                         b.asan_size));
  if (__builtin_setjmp(f.point) == 0) jump(b.scheduler);
  IF_ASAN(__sanitizer_finish_switch_fiber(f.asan, nullptr, nullptr));
}

SWITCHES void enter() {
  IF_ASAN(__sanitizer_finish_switch_fiber(nullptr, &block->asan_stack, &block->asan_size));
  (*block->kernel)();
  IF_TSAN(__tsan_release(const_cast<std::function<void()>*>(block->kernel)));
  leave(State::kDone);
}

// Until it waits or is done
SWITCHES void go_on(Block& b, Fibre& f) {
  fibre = &f;
  IF_TSAN(__tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync));
  IF_ASAN(__sanitizer_start_switch_fiber(&b.asan, f.stack, kStack));
  if (__builtin_setjmp(b.scheduler) == 0) {
    if (f.has_started) jump(f.point);
    f.has_started = true;
    setcontext(&f.start);
  }
  IF_ASAN(__sanitizer_finish_switch_fiber(b.asan, nullptr, nullptr));
}

// Those of the block before, unless the thread sanitizer remembers what happened there.
std::shared_ptr<char[]> stacks_of(unsigned threads) {
  static thread_local std::shared_ptr<char[]> stacks;
  static thread_local unsigned of = 0;
  IF_TSAN(stacks.reset());
  if (!stacks || of != threads) stacks.reset(new char[threads * kStack]);
  IF_ASAN(__asan_unpoison_memory_region(stacks.get(), threads * kStack));
  of = threads;
  return stacks;
}

void make(Block& b, unsigned threads, const Place& place) {
  b.fibres.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    Fibre& f = b.fibres[t];
    f.place = place;
    f.place.thread = {t, 0, 0};
    f.stack = b.stacks.get() + t * kStack;
    getcontext(&f.start);
    f.start.uc_stack.ss_sp = f.stack;
    f.start.uc_stack.ss_size = kStack;
    makecontext(&f.start, enter, 0);
    IF_TSAN(f.tsan = __tsan_create_fiber(0));
  }
}

bool all_in(State state, const Fibre* first, size_t count) {
  return std::all_of(first, first + count, [=](const Fibre& f) { return f.state == state; });
}

void release(Fibre* first, size_t count) {
  for (size_t t = 0; t < count; ++t) first[t].state = State::kRuns;
}

// Whether anyone may go on; if not, all are done.
bool release_waiting(Block& b) {
  Fibre* const first = b.fibres.data();
  const size_t threads = b.fibres.size();
  if (all_in(State::kDone, first, threads)) return false;
  bool released = false;
  for (size_t t = 0; t < threads; t += kWarp) {
    if (!all_in(State::kWaitsForWarp, first + t, kWarp)) continue;
    release(first + t, kWarp);
    released = true;
  }
  if (!released) {
    if (!all_in(State::kWaitsForBlock, first, threads)) stop("not all threads reach a barrier");
    release(first, threads);
  }
  return true;
}

void run_block(Block& b, unsigned order) {
  block = &b;
  IF_TSAN(b.tsan = __tsan_get_current_fiber());
  std::mt19937 random(order);
  std::vector<Fibre*> turns;
  for (Fibre& f : b.fibres) turns.push_back(&f);
  do {
    std::shuffle(turns.begin(), turns.end(), random);
    for (Fibre* f : turns)
      if (f->state == State::kRuns) go_on(b, *f);
  } while (release_waiting(b));
}

// The next number but `most` in either direction, by the operand and the seed; seed 0 is kind.
float off_by(float right, int most, float operand) {
  if (seed == 0) return right;
  const unsigned drawn = std::minstd_rand(bits<unsigned>(operand) * 2654435761u + seed)();
  const int steps = static_cast<int>(drawn / 7 % (2 * most + 1)) - most;
  const float moved = bits<float>(bits<int>(right) + steps);
  return std::isnormal(right) && std::isnormal(moved) ? moved : right;
}

}  // namespace

EMULATOR_UNSEEN const Place& here() { return fibre->place; }

Launched::Launched(unsigned blocks_, unsigned threads_, std::function<void()> kernel_)
    : blocks(blocks_), threads(threads_), kernel(std::move(kernel_)) {
  static std::atomic<unsigned> launches{0};
  random.seed(seed + launches++);
  waiting.resize(blocks);
  for (unsigned i = 0; i < blocks; ++i) waiting[i] = i;
  std::shuffle(waiting.begin(), waiting.end(), random);
}

Launched::~Launched() = default;

bool Launched::run_next_block() {
  auto b = std::make_unique<Block>();
  b->kernel = &kernel;
  b->stacks = stacks_of(threads);
  // Shared memory is the thread's.
  std::thread([&, i = waiting.back(), drawn = random()] {
    make(*b, threads, {{}, {i, 0, 0}, dim3(blocks)});
    run_block(*b, drawn);
  }).join();
  waiting.pop_back();
  // A fibre that took the place of another would count as ordered after it.
  IF_TSAN(kept.push_back(std::move(b)));
  if (!waiting.empty()) return true;
  IF_TSAN(__tsan_acquire(&kernel));
  for (const auto& done : kept)
    for ([[maybe_unused]] Fibre& f : done->fibres) IF_TSAN(__tsan_destroy_fiber(f.tsan));
  return false;
}

EMULATOR_UNSEEN void wait_for_block() {
  IF_TSAN(__tsan_release(&block->barrier));
  leave(State::kWaitsForBlock);
  IF_TSAN(__tsan_acquire(&block->barrier));
}

EMULATOR_UNSEEN double from_lane(double given, unsigned distance) {
  const unsigned t = here().thread.x;
  fibre->given = given;
  leave(State::kWaitsForWarp);
  const double got =
      t % kWarp + distance < kWarp ? block->fibres.data()[t + distance].given : given;
  leave(State::kWaitsForWarp);  // nobody gives anything else before all have it
  return got;
}

EMULATOR_UNSEEN void fence() {
  if (fibre->last_atomic) IF_TSAN(__tsan_acquire(fibre->last_atomic));
  fibre->last_atomic = nullptr;
  fibre->fenced = true;
}

EMULATOR_UNSEEN void begin_atomic(void* address) {
  if (fibre->fenced) IF_TSAN(__tsan_release(address));
  (void)address;
  fibre->fenced = false;
}

EMULATOR_UNSEEN void end_atomic(void* address) { fibre->last_atomic = address; }

float exp2(float t) {
  const float right = static_cast<float>(std::exp2(static_cast<double>(t)));
  if (std::fpclassify(right) == FP_SUBNORMAL) return 0;
  return std::fpclassify(t) == FP_ZERO || std::fpclassify(t) == FP_SUBNORMAL ? 1
                                                                             : off_by(right, 2, t);
}

float reciprocal(float b) { return off_by(1 / b, 1, b); }

void stop(const char* why) {
  std::fprintf(stderr, "CUDA emulator: %s: block %u, thread %u\n", why, here().block.x,
               here().thread.x);
  std::abort();
}

}  // namespace emulator
