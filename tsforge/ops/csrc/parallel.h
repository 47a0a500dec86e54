// Static partition of independent jobs over threads that live for one call: nothing survives a fork, and which thread
// takes a job never changes its result.
#pragma once
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Calls job(worker, begin, end) for slices of [0, count), worker < threads; the calling thread is worker 0.
template <class Job>
void parallel_for(int64_t count, int64_t threads, const Job &job) {
  if (threads > count) threads = count;
  if (threads <= 1) {
    if (count > 0) job(int64_t(0), int64_t(0), count);
    return;
  }
  std::vector<std::thread> others;
  others.reserve(static_cast<size_t>(threads));
  for (int64_t worker = 1; worker < threads; ++worker) {
    const int64_t begin = count * worker / threads, end = count * (worker + 1) / threads;
    try {
      others.emplace_back([&job, worker, begin, end] { job(worker, begin, end); });
    } catch (const std::system_error &) {  // no thread to be had: do it here
      job(worker, begin, end);
    }
  }
  job(int64_t(0), int64_t(0), count / threads);
  for (auto &other : others) other.join();
}
