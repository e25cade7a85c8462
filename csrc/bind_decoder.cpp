// The language model's decode step.

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <vector>

#include "bind.h"
#include "bind_linear.h"
#include "decoder.h"

namespace ovfast {
namespace {

using Weights = std::shared_ptr<PackedWeights>;

constexpr std::int64_t kMostHeads = 1 << 16;
constexpr std::int64_t kMostPositions = std::int64_t{1} << 30;

// The model, and the Python objects whose memory it reads.
class Decoder {
 public:
  Decoder(ThreadPool& pool, const Weights& embedding, const py::object& norm, const Weights& head,
          float eps, std::int64_t num_heads, std::int64_t num_kv_heads, std::int64_t head_dim,
          const py::object& cos, const py::object& sin)
      : pool_(pool) {
    CheckRange(num_kv_heads, "num_kv_heads", 1, kMostHeads);
    CheckRange(num_heads, "num_heads", num_kv_heads, kMostHeads);
    CheckRange(head_dim, "head_dim", 2, kMostHeads);
    if (num_heads % num_kv_heads != 0 || head_dim % 2 != 0) {
      throw py::value_error("num_heads " + std::to_string(num_heads) + ", num_kv_heads " +
                            std::to_string(num_kv_heads) + ", head_dim " +
                            std::to_string(head_dim) +
                            "; expected whole groups of heads and an even head_dim");
    }
    model_.num_heads = num_heads;
    model_.num_kv_heads = num_kv_heads;
    model_.head_dim = head_dim;
    model_.eps = eps;
    hidden_ = Matrix(embedding, "embedding", kAny, kAny, &model_.embedding).cols;
    if (model_.embedding.rows < 1) throw py::value_error("embedding has no rows");
    CheckRange(model_.embedding.rows, "the number of rows of embedding", 1,
               std::numeric_limits<std::int32_t>::max());
    Matrix(head, "head", model_.embedding.rows, hidden_, &model_.head);
    model_.norm = Vector(norm, "norm", hidden_);
    model_.cos = Table(cos, "cos", &max_positions_);
    std::int64_t sin_positions = 0;
    model_.sin = Table(sin, "sin", &sin_positions);
    max_positions_ = std::min(max_positions_, sin_positions);
    CheckRange(max_positions_, "the number of rows of cos and sin", 1, kMostPositions);
  }

  void AddLayer(const py::object& input_norm, const Weights& qkv, const py::object& qkv_bias,
                const Weights& o, const py::object& post_norm, const Weights& gate_up,
                const Weights& down) {
    // Another thread of Python may be in a step.
    if (workspace_ != nullptr) throw py::value_error("the decoder has made a step; it is complete");
    DecoderLayer layer{};
    const std::int64_t attended = model_.num_heads * model_.head_dim;
    const std::int64_t width = attended + 2 * model_.num_kv_heads * model_.head_dim;
    layer.input_norm = Vector(input_norm, "input_norm", hidden_);
    Matrix(qkv, "qkv", width, hidden_, &layer.qkv);
    layer.qkv_bias = Vector(qkv_bias, "qkv_bias", width);
    Matrix(o, "o", hidden_, attended, &layer.o);
    layer.post_norm = Vector(post_norm, "post_norm", hidden_);
    Matrix(gate_up, "gate_up", kAny, hidden_, &layer.gate_up);
    Matrix(down, "down", hidden_, kAny, &layer.down);
    const std::int64_t padded = NumBlocks(layer.down.cols) * kBlock;
    if (layer.gate_up.rows != 2 * padded) {
      throw py::value_error("gate_up has " + std::to_string(layer.gate_up.rows) +
                            " rows; expected " + std::to_string(2 * padded) +
                            ": interleaved, for down's " + std::to_string(layer.down.cols) +
                            " columns");
    }
    if (!model_.layers.empty() && model_.layers[0].gate_up.rows != layer.gate_up.rows) {
      throw py::value_error("gate_up has other sizes than that of the first layer");
    }
    model_.layers.push_back(layer);
  }

  void Step(const py::object& k_object, const py::object& v_object, const py::object& tokens_object,
            const py::object& slots_object, const py::object& positions_object,
            const py::object& forbidden_object, const py::object& logits_object,
            const py::object& greedy_object) {
    if (model_.layers.empty()) throw py::value_error("the decoder has no layers; add_layer first");
    const std::int64_t vocab_size = model_.head.rows;
    const std::int64_t layers = static_cast<std::int64_t>(model_.layers.size());
    py::array k_cache = CheckOutput(k_object, "k_cache", "float32",
                                    {layers, kAny, model_.num_kv_heads, kAny, model_.head_dim});
    const py::ssize_t num_slots = k_cache.shape(1), positions_of_slot = k_cache.shape(3);
    py::array v_cache =
        CheckOutput(v_object, "v_cache", "float32",
                    {layers, num_slots, model_.num_kv_heads, positions_of_slot, model_.head_dim});
    const std::vector<std::int32_t> tokens = Integers(tokens_object, "tokens", kAny);
    const py::ssize_t rows = static_cast<py::ssize_t>(tokens.size());
    const std::vector<std::int32_t> slots = Integers(slots_object, "slots", rows);
    const std::vector<std::int32_t> positions = Integers(positions_object, "positions", rows);
    const py::array forbidden = CheckArray(forbidden_object, "forbidden", "uint8", {vocab_size});
    py::array logits = CheckOutput(logits_object, "logits", "float32", {kAny, vocab_size});
    py::array greedy = CheckOutput(greedy_object, "greedy", "int32", {rows});
    if (logits.shape(0) < rows) {
      throw py::value_error("logits has " + std::to_string(logits.shape(0)) +
                            " rows; expected at least " + std::to_string(rows));
    }
    CheckDisjoint(k_cache, "k_cache", v_cache, "v_cache");
    CheckDisjoint(k_cache, "k_cache", logits, "logits");
    CheckDisjoint(v_cache, "v_cache", logits, "logits");
    CheckValues(tokens, "tokens", 0, model_.embedding.rows - 1);
    CheckValues(slots, "slots", 0, num_slots - 1);
    CheckValues(positions, "positions", 0,
                std::min<std::int64_t>(max_positions_, positions_of_slot) - 1);
    std::vector<char> taken(static_cast<std::size_t>(num_slots), 0);
    for (std::size_t i = 0; i < slots.size(); ++i) {
      char& is_taken = taken[static_cast<std::size_t>(slots[i])];
      if (is_taken != 0) {
        throw py::value_error("slots[" + std::to_string(i) + "] appears twice");
      }
      is_taken = 1;
    }
    if (workspace_ == nullptr) workspace_ = std::make_unique<float[]>(DecodeWorkspace(model_));
    DecodeStepArgs args{};
    args.num_rows = rows;
    args.tokens = tokens.data();
    args.slots = slots.data();
    args.positions = positions.data();
    args.k_cache = MutableData<float>(k_cache);
    args.v_cache = MutableData<float>(v_cache);
    args.num_slots = num_slots;
    args.max_positions = positions_of_slot;
    args.forbidden = Data<std::uint8_t>(forbidden);
    args.logits = MutableData<float>(logits);
    args.greedy = MutableData<std::int32_t>(greedy);
    // Two threads of Python may step one decoder: the second waits for the first's buffers.
    const WithoutLock without_lock;
    const std::lock_guard<std::mutex> lock(mutex_);
    pool_.Run([&](Team& team) { DecodeStep(team, model_, args, workspace_.get()); });
  }

 private:
  static std::vector<std::int32_t> Integers(const py::object& object, const char* name,
                                            py::ssize_t size) {
    return CopyOf<std::int32_t>(CheckArray(object, name, "int32", {size}));
  }

  const PackedMatrix& Matrix(const Weights& weights, const char* name, std::int64_t rows,
                             std::int64_t cols, PackedMatrix* out) {
    if (weights == nullptr) throw py::type_error(std::string(name) + " is None");
    const PackedMatrix& matrix = weights->matrix;
    if ((rows != kAny && matrix.rows != rows) || (cols != kAny && matrix.cols != cols)) {
      throw py::value_error(std::string(name) + " is (" + std::to_string(matrix.rows) + ", " +
                            std::to_string(matrix.cols) + "); expected (" +
                            (rows == kAny ? "any" : std::to_string(rows)) + ", " +
                            (cols == kAny ? "any" : std::to_string(cols)) + ")");
    }
    weights_.push_back(weights);
    *out = matrix;
    return *out;
  }

  const float* Vector(const py::object& object, const char* name, std::int64_t size) {
    const py::array array = CheckArray(object, name, "float32", {size});
    arrays_.push_back(array);
    return Data<float>(array);
  }

  const float* Table(const py::object& object, const char* name, std::int64_t* positions) {
    const py::array array = CheckArray(object, name, "float32", {kAny, model_.head_dim / 2});
    arrays_.push_back(array);
    *positions = array.shape(0);
    return Data<float>(array);
  }

  ThreadPool& pool_;
  std::vector<Weights> weights_;
  std::vector<py::array> arrays_;
  DecoderModel model_{};
  std::int64_t hidden_ = 0;         // of the residual stream
  std::int64_t max_positions_ = 0;  // of cos and sin
  std::unique_ptr<float[]> workspace_;
  std::mutex mutex_;
};

}  // namespace
}  // namespace ovfast

template <>
class pybind11::detail::type_caster<ovfast::Decoder> : public ConstructedCaster<ovfast::Decoder> {};

namespace ovfast {

void BindDecoder(py::module_& m) {
  py::class_<Decoder>(m, "Decoder", R"doc(Qwen2 as it decodes: a step is one call.

The arrays and weights that it is given are kept, not copied.

Args:
    pool: threads.
    embedding: (vocab_size, hidden_size).
    norm: (hidden_size,) float32, before the head.
    head: (vocab_size, hidden_size); may be the embedding.
    eps: of the norms.
    num_heads: of the queries.
    num_kv_heads: of the keys and of the values.
    head_dim: even.
    cos: (positions, head_dim / 2) float32.
    sin: as cos.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: sizes that do not fit together.)doc")
      .def(py::init<ThreadPool&, const Weights&, const py::object&, const Weights&, float,
                    std::int64_t, std::int64_t, std::int64_t, const py::object&,
                    const py::object&>(),
           py::arg("pool"), py::arg("embedding"), py::arg("norm"), py::arg("head"), py::arg("eps"),
           py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_dim"), py::arg("cos"),
           py::arg("sin"), py::keep_alive<1, 2>())
      .def("add_layer", &Decoder::AddLayer, py::arg("input_norm"), py::arg("qkv"),
           py::arg("qkv_bias"), py::arg("o"), py::arg("post_norm"), py::arg("gate_up"),
           py::arg("down"), R"doc(Adds the next layer.

Args:
    input_norm: (hidden_size,) float32.
    qkv: hidden_size → (num_heads + 2 · num_kv_heads) · head_dim.
    qkv_bias: float32.
    o: num_heads · head_dim → hidden_size.
    post_norm: (hidden_size,) float32.
    gate_up: hidden_size → 2 · intermediate_size, packed interleaved.
    down: intermediate_size → hidden_size.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: sizes that do not fit together, or a step was made before.)doc")
      .def("step", &Decoder::Step, py::arg("k_cache"), py::arg("v_cache"), py::arg("tokens"),
           py::arg("slots"), py::arg("positions"), py::arg("forbidden"), py::arg("logits"),
           py::arg("greedy"), R"doc(Appends one token to each of some requests.

Args:
    k_cache: (layers, slots, num_kv_heads, positions, head_dim) float32, written at the positions.
    v_cache: as k_cache.
    tokens: (num_rows,) int32, what each request appends.
    slots: (num_rows,) int32, of the cache, each at most once.
    positions: (num_rows,) int32, of the tokens; positions before are read.
    forbidden: (vocab_size,) uint8, not 0 where a token is never chosen.
    logits: (num_rows or more, vocab_size) float32, written.
    greedy: (num_rows,) int32, written: the most likely allowed token, the lowest of equals; -1
        where a logit is not finite or every token is forbidden.

Raises:
    TypeError: an argument of the wrong type or dtype.
    ValueError: a wrong shape, a value out of range, or arrays that share memory.)doc");
}

}  // namespace ovfast
