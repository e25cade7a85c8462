// The Python module. Arguments are checked and converted in bind_*.cpp.

#include "bind.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native CPU operations of ovfast.";
  ovfast::BindPool(m);
  ovfast::BindAttention(m);
  ovfast::BindDecoder(m);
  ovfast::BindLinear(m);
  ovfast::BindNorm(m);
  ovfast::BindPixels(m);
  ovfast::BindRope(m);
  ovfast::BindSample(m);
}
