// A kernel that has been launched, and runs a block at a time.
#pragma once

#include <memory>
#include <random>
#include <vector>

#include "cuda.h"

namespace emulator {

struct Block;

// The blocks run one after the other, in an order drawn from EMULATOR_SEED; the threads of one take
// turns in an order that is drawn anew between one wait and the next. Ends the process where
// threads of a block would wait for each other forever.
class Launched {
 public:
  Launched(unsigned blocks, unsigned threads, std::function<void()> kernel);
  ~Launched();
  // Whether there is another
  bool run_next_block();

 private:
  const unsigned blocks, threads;
  std::function<void()> kernel;
  std::mt19937 random;
  std::vector<unsigned> waiting;
  std::vector<std::unique_ptr<Block>> kept;
};

}  // namespace emulator
