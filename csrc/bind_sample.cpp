// The choice of tokens.

#include <cmath>
#include <limits>
#include <vector>

#include "argmax.h"
#include "bind.h"
#include "kernel_table.h"
#include "sample.h"

namespace ovfast {
namespace {

constexpr std::int64_t kMostTokens = std::numeric_limits<std::int32_t>::max();

void ArgmaxBinding(ThreadPool& pool, const py::object& logits_object,
                   const py::object& forbidden_object, const py::object& out_object) {
  const py::array logits = CheckArray(logits_object, "logits", "float32", {kAny, kAny});
  CheckRange(logits.shape(1), "the number of columns of logits", 1, kMostTokens);
  const py::array forbidden = CheckArray(forbidden_object, "forbidden", "uint8", {logits.shape(1)});
  py::array out = CheckOutput(out_object, "out", "int32", {logits.shape(0)});
  ArgmaxArgs args{};
  args.logits = Data<float>(logits);
  args.num_rows = logits.shape(0);
  args.vocab_size = logits.shape(1);
  args.forbidden = Data<std::uint8_t>(forbidden);
  args.tokens = MutableData<std::int32_t>(out);
  RunOn(pool, [&](Team& team) { Kernels().argmax(team, args); });
}

void CheckNumber(double value, const char* name, double least, double most, bool open) {
  if (value <= most && (open ? value > least : value >= least)) return;  // also false for NaN
  throw py::value_error(std::string(name) + " is " + std::to_string(value) + "; expected " +
                        (open ? "above " : "at least ") + std::to_string(least) + " and at most " +
                        std::to_string(most));
}

std::int32_t SampleBinding(const py::object& logits_object, const py::object& forbidden_object,
                           const py::object& seen_object, const py::object& suppressed_object,
                           double penalty, double temperature, std::int64_t top_k, double top_p,
                           double min_p, double uniform) {
  constexpr double kMost = std::numeric_limits<float>::max();
  const py::array logits = CheckArray(logits_object, "logits", "float32", {kAny});
  const py::ssize_t vocab_size = logits.shape(0);
  CheckRange(vocab_size, "the size of logits", 1, kMostTokens);
  const py::array forbidden = CheckArray(forbidden_object, "forbidden", "uint8", {vocab_size});
  py::array seen;
  if (!seen_object.is_none()) seen = CheckArray(seen_object, "seen", "uint8", {vocab_size});
  const std::vector<std::int32_t> suppressed =
      CopyOf<std::int32_t>(CheckArray(suppressed_object, "suppressed", "int32", {kAny}));
  CheckValues(suppressed, "suppressed", 0, vocab_size - 1);
  CheckNumber(penalty, "penalty", 0.0, kMost, true);
  CheckNumber(temperature, "temperature", 0.0, kMost, false);
  CheckRange(top_k, "top_k", 1, std::numeric_limits<std::int64_t>::max());
  CheckNumber(top_p, "top_p", 0.0, 1.0, true);
  CheckNumber(min_p, "min_p", 0.0, 1.0, false);
  CheckNumber(uniform, "uniform", 0.0, 1.0, false);
  SampleArgs args{};
  args.logits = Data<float>(logits);
  args.vocab_size = vocab_size;
  args.forbidden = Data<std::uint8_t>(forbidden);
  args.seen = seen_object.is_none() ? nullptr : Data<std::uint8_t>(seen);
  args.suppressed = suppressed.data();
  args.num_suppressed = static_cast<std::int64_t>(suppressed.size());
  args.penalty = static_cast<float>(penalty);
  args.temperature = static_cast<float>(temperature);
  args.top_k = top_k;
  args.top_p = top_p;
  args.min_p = static_cast<float>(min_p);
  args.uniform = uniform;
  const WithoutLock without_lock;
  return Sample(args);
}

}  // namespace

void BindSample(py::module_& m) {
  m.def("argmax", &ArgmaxBinding, py::arg("pool"), py::arg("logits"), py::arg("forbidden"),
        py::arg("out"), R"doc(The most likely allowed token of each row.

Args:
    pool: threads.
    logits: (num_rows, vocab_size) float32.
    forbidden: (vocab_size,) uint8, not 0 where a token is never chosen.
    out: (num_rows,) int32, written: the lowest id of the largest logit; -1 where a logit is not
        finite or every token is forbidden.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride.)doc");
  m.def("sample", &SampleBinding, py::arg("logits"), py::arg("forbidden"), py::arg("seen"),
        py::arg("suppressed"), py::arg("penalty"), py::arg("temperature"), py::arg("top_k"),
        py::arg("top_p"), py::arg("min_p"), py::arg("uniform"),
        R"doc(Chooses one token by the rules of SamplingParams.

Args:
    logits: (vocab_size,) float32.
    forbidden: (vocab_size,) uint8, not 0 where a token is never chosen.
    seen: (vocab_size,) uint8, not 0 where the penalty applies; or None.
    suppressed: (num,) int32, ids that are not allowed yet.
    penalty: repetition penalty; 1 is none.
    temperature: 0 takes the most likely token.
    top_k: vocab_size or more keeps all.
    top_p: 1 keeps all.
    min_p: 0 keeps all.
    uniform: the random number, in [0, 1).

Returns:
    The token; -1 where the largest allowed logit is not finite.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape, or a value out of range.)doc");
}

}  // namespace ovfast
