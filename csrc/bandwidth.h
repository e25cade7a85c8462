// How fast the threads of a pool read memory: the floor of a decode step.

#ifndef OVFAST_CSRC_BANDWIDTH_H_
#define OVFAST_CSRC_BANDWIDTH_H_

#include <cstddef>
#include <cstdint>

#include "thread_pool.h"

namespace ovfast {

// Bytes a second at which all threads together read a buffer, the best of a few passes.
// words: at least 1, and more than the caches hold, or it is their speed.
double ReadBandwidth(ThreadPool& pool, const std::uint64_t* words, std::size_t num_words);

}  // namespace ovfast

#endif  // OVFAST_CSRC_BANDWIDTH_H_
