// Layer norm and RMS norm.

#include "bind.h"
#include "bind_cache.h"
#include "kernel_table.h"
#include "norm.h"

namespace ovfast {
namespace {

void CheckEps(float eps) {
  if (eps >= 0.0f) return;
  throw py::value_error("eps is " + std::to_string(eps) + "; expected 0 or more");
}

void LayerNorm(ThreadPool& pool, const py::object& x_object, const py::object& weight_object,
               const py::object& bias_object, float eps, const py::object& out_object) {
  const py::array x = CheckArray(x_object, "x", "float32", {kAny, kAny}, 1);
  const py::ssize_t hidden = x.shape(1);
  CheckSize(hidden, "the width of x");
  const py::array weight = CheckArray(weight_object, "weight", "float32", {hidden});
  const py::array bias = CheckArray(bias_object, "bias", "float32", {hidden});
  CheckEps(eps);
  py::array out = CheckOutput(out_object, "out", "float32", {x.shape(0), hidden}, 1);
  CheckDisjoint(x, "x", out, "out");
  CheckDisjoint(weight, "weight", out, "out");
  CheckDisjoint(bias, "bias", out, "out");
  if (x.shape(0) == 0) return;
  const LayerNormArgs args = {
      Data<float>(x),         StrideOf<float>(x, 0), x.shape(0), hidden,
      Data<float>(weight),    Data<float>(bias),     eps,        MutableData<float>(out),
      StrideOf<float>(out, 0)};
  RunOn(pool, [&](Team& team) { Kernels().layer_norm(team, args); });
}

void RmsNorm(ThreadPool& pool, const py::object& x_object, const py::object& weight_object,
             float eps, const py::object& out_object) {
  const py::array x = CheckArray(x_object, "x", "float32", {kAny, kAny}, 1);
  const py::ssize_t hidden = x.shape(1);
  CheckSize(hidden, "the width of x");
  const py::array weight = CheckArray(weight_object, "weight", "float32", {hidden});
  CheckEps(eps);
  py::array out = CheckOutput(out_object, "out", "float32", {x.shape(0), hidden}, 1);
  CheckDisjoint(x, "x", out, "out");
  CheckDisjoint(weight, "weight", out, "out");
  if (x.shape(0) == 0) return;
  const RmsNormArgs args = {
      Data<float>(x),          StrideOf<float>(x, 0),  x.shape(0), hidden, Data<float>(weight), eps,
      MutableData<float>(out), StrideOf<float>(out, 0)};
  RunOn(pool, [&](Team& team) { Kernels().rms_norm(team, args); });
}

}  // namespace

void BindNorm(py::module_& m) {
  m.def("layer_norm", &LayerNorm, py::arg("pool"), py::arg("x"), py::arg("weight"), py::arg("bias"),
        py::arg("eps"), py::arg("out"),
        R"doc(out = (x - mean) / sqrt(variance + eps) · weight + bias, over the last axis.

Args:
    pool: threads.
    x: (num_rows, hidden) float32, rows at any stride.
    weight: (hidden,) float32.
    bias: (hidden,) float32.
    eps: 0 or more.
    out: (num_rows, hidden) float32, rows at any stride.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, or arrays that share memory.)doc");
  m.def("rms_norm", &RmsNorm, py::arg("pool"), py::arg("x"), py::arg("weight"), py::arg("eps"),
        py::arg("out"), R"doc(out = x / sqrt(mean of x² + eps) · weight, over the last axis.

Args:
    pool: threads.
    x: (num_rows, hidden) float32, rows at any stride.
    weight: (hidden,) float32.
    eps: 0 or more.
    out: (num_rows, hidden) float32, rows at any stride.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape or stride, or arrays that share memory.)doc");
}

}  // namespace ovfast
