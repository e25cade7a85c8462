// Threads and instruction sets, as Python sees them.

#include <cstdint>
#include <cstring>
#include <vector>

#include "bandwidth.h"
#include "bind.h"
#include "kernel_table.h"

namespace ovfast {
namespace {

double MeasureReadBandwidth(ThreadPool& pool, std::int64_t num_bytes) {
  constexpr std::int64_t kWord = sizeof(std::uint64_t);
  CheckRange(num_bytes, "num_bytes", kWord, std::int64_t{8} << 30);
  std::vector<std::uint64_t> words(static_cast<std::size_t>(num_bytes / kWord), 1);
  const WithoutLock without_lock;
  return ReadBandwidth(pool, words.data(), words.size());
}

}  // namespace

void BindPool(py::module_& m) {
  py::class_<ThreadPool>(m, "ThreadPool", R"doc(Threads for the native operations.

Args:
    num_threads: threads of an operation, the caller included, 1 to 1024.

Raises:
    ValueError: another number of threads.)doc")
      .def(py::init([](std::int64_t num_threads) {
             CheckRange(num_threads, "num_threads", 1, 1024);
             return new ThreadPool(static_cast<int>(num_threads));
           }),
           py::arg("num_threads"))
      .def_property_readonly("num_threads",
                             [](const ThreadPool& self) { return self.num_threads(); });
  m.def(
      "isa", [] { return Kernels().isa; },
      "The instruction set in use: 'scalar', 'avx2' or 'avx512'.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (const char* const isa : {"scalar", "avx2", "avx512"}) {
          if (KernelsOf(isa) != nullptr) names.append(isa);
        }
        return names;
      },
      "The instruction sets that this CPU and this build have.");
  m.def("bfloat16_products", &HasBrainProducts,
        "Whether the instruction set in use multiplies bfloat16 with bfloat16 on this CPU.");
  m.def(
      "use_isa",
      [](const std::string& isa) {
        if (!UseIsa(isa.c_str())) {
          throw py::value_error("isa is '" + isa + "'; expected one of `isas()`");
        }
      },
      py::arg("isa"), R"doc(Uses another instruction set from now on, for tests.

Raises:
    ValueError: the CPU or the build lacks it.)doc");
  m.def("read_bandwidth", &MeasureReadBandwidth, py::arg("pool"), py::arg("num_bytes"),
        R"doc(Bytes a second at which the pool's threads read memory, the best of a few passes.

Args:
    pool: threads.
    num_bytes: size of the buffer, 8 to 8 GiB; more than the caches hold, or it is their speed.

Raises:
    ValueError: too small or too large a buffer.
    MemoryError: no memory for it.)doc");
}

}  // namespace ovfast
