// What may go wrong inside a native function, and how Python comes to know of it: no exception may leave a function
// that C calls, nor a parallel region.

#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <stdexcept>
#include <type_traits>

namespace {

// What an exported function returns. `native_library.py` has the same numbers.
enum Status : int {
  DONE = 0,
  OUT_OF_MEMORY = 1,
  UNFIT = 2,  // an index points outside of what it is for; nothing of the output is to be used
  FAILED = 3,
};

// Thrown where an index that comes from outside (a token id, an expert, a key) points outside of its array.
struct Unfit : std::exception {};

// Throws unless all of some indices are from 0 to `limit` - 1.
inline void must_be_below(const int64_t* indices, int64_t count, int64_t limit) {
  for (int64_t i = 0; i < count; ++i)
    if (indices[i] < 0 || indices[i] >= limit) throw Unfit();
}

// The status of an exception; only inside of a handler.
inline Status status_of_exception() {
  try {
    throw;
  } catch (const std::bad_alloc&) {
    return OUT_OF_MEMORY;
  } catch (const std::length_error&) {  // a vector that is larger than any memory
    return OUT_OF_MEMORY;
  } catch (const Unfit&) {
    return UNFIT;
  } catch (...) {
    return FAILED;
  }
}

// Exceptions in the threads of a parallel region. After the first one the other tasks are left out, and `raise`, behind
// the region, throws in the thread that began it.
class Failure {
 public:
  template <class Act>
  void watch(Act act) noexcept {
    if (status_.load(std::memory_order_relaxed) != DONE) return;
    try {
      act();
    } catch (...) {
      int none = DONE;
      status_.compare_exchange_strong(none, status_of_exception());
    }
  }

  void raise() const {
    switch (status_.load()) {
      case DONE:
        return;
      case OUT_OF_MEMORY:
        throw std::bad_alloc();
      case UNFIT:
        throw Unfit();
      default:
        throw std::runtime_error("a native function failed");
    }
  }

 private:
  std::atomic<int> status_{DONE};
};

// A function as it is exported: the same arguments, and the status as its result.
template <auto function>
struct Exported;

template <class... Arguments, void (*function)(Arguments...)>
struct Exported<function> {
  static int call(Arguments... arguments) noexcept {
    try {
      function(arguments...);
      return DONE;
    } catch (...) {
      return status_of_exception();
    }
  }

  // One letter for each argument: a pointer, an integer of 64 bits, or a double.
  template <class Argument>
  static constexpr char kind() {
    static_assert(std::is_pointer_v<Argument> || std::is_same_v<Argument, int64_t> || std::is_same_v<Argument, double>);
    return std::is_pointer_v<Argument> ? 'p' : std::is_same_v<Argument, double> ? 'd' : 'i';
  }
  static constexpr char kinds[] = {kind<Arguments>()..., '\0'};
};

}  // namespace
