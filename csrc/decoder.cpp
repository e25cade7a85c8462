#include "decoder.h"

#include "argmax.h"
#include "attention.h"
#include "kernel_table.h"
#include "norm.h"
#include "rope.h"

namespace ovfast {
namespace {

// Buffers of a step, each of kStepRows rows.
struct Buffers {
  float* residual;  // (rows, hidden_size)
  float* normed;    // (rows, hidden_size)
  float* qkv;       // (rows, qkv.rows)
  float* attended;  // (rows, num_heads · head_dim)
  float* mlp;       // (rows, gate_up.rows / 2)
};

struct Sizes {
  std::int64_t hidden, qkv, attended, mlp;  // floats of a row
};

Sizes SizesOf(const DecoderModel& model) {
  Sizes sizes{};
  sizes.hidden = model.embedding.cols;
  sizes.attended = model.num_heads * model.head_dim;
  for (const DecoderLayer& layer : model.layers) {
    sizes.qkv = layer.qkv.rows;
    sizes.mlp = layer.gate_up.rows / 2;
  }
  return sizes;
}

// The next `row` floats for each of the rows of a step.
float* Take(float** memory, std::int64_t row) {
  float* const taken = *memory;
  *memory += row * kStepRows;
  return taken;
}

void Norm(Team& team, const float* x, const float* weight, const DecoderModel& model,
          std::int64_t rows, float* out) {
  RmsNormArgs args{};
  args.x = x;
  args.x_stride = args.out_stride = args.hidden = model.embedding.cols;
  args.num_rows = rows;
  args.weight = weight;
  args.eps = model.eps;
  args.out = out;
  Kernels().rms_norm(team, args);
}

// out = matrix · x, or out += the same; int8 has inputs of 16 bits.
void Project(Team& team, const PackedMatrix& matrix, const float* x, std::int64_t x_stride,
             std::int64_t rows, const float* bias, Activation activation, bool accumulates,
             float* out, std::int64_t out_cols) {
  LinearArgs args{};
  args.x = x;
  args.x_stride = x_stride;
  args.num_rows = rows;
  args.matrix = matrix;
  args.bias = bias;
  args.activation = activation;
  args.accumulates = accumulates;
  args.wide_inputs = true;
  args.out = out;
  args.out_stride = args.out_cols = out_cols;
  RunLinear(team, args);
}

void Attend(Team& team, const DecoderModel& model, const DecodeStepArgs& step, std::int64_t layer,
            std::int64_t first, std::int64_t rows, const Buffers& buffers,
            std::int64_t qkv_stride) {
  const std::int64_t head_stride = step.max_positions * model.head_dim;
  const std::int64_t slot_stride = model.num_kv_heads * head_stride;
  const std::int64_t offset = layer * step.num_slots * slot_stride;
  RopeArgs rope{};
  rope.qkv = buffers.qkv;
  rope.qkv_stride = qkv_stride;
  rope.num_rows = rows;
  rope.num_heads = model.num_heads;
  rope.num_kv_heads = model.num_kv_heads;
  rope.head_dim = model.head_dim;
  rope.cos = model.cos;
  rope.sin = model.sin;
  rope.table_stride = model.head_dim / 2;
  rope.k_cache = step.k_cache + offset;
  rope.v_cache = step.v_cache + offset;
  rope.head_stride = head_stride;
  rope.slot_stride = slot_stride;
  rope.slots = step.slots + first;
  rope.positions = step.positions + first;
  Kernels().rope(team, rope);
  DecodeAttentionArgs attention{};
  attention.q = buffers.qkv;
  attention.q_stride = qkv_stride;
  attention.num_rows = rows;
  attention.num_heads = model.num_heads;
  attention.num_kv_heads = model.num_kv_heads;
  attention.head_dim = model.head_dim;
  attention.k_cache = step.k_cache + offset;
  attention.v_cache = step.v_cache + offset;
  attention.head_stride = head_stride;
  attention.slot_stride = slot_stride;
  attention.slots = step.slots + first;
  attention.positions = step.positions + first;
  attention.out = buffers.attended;
  attention.out_stride = model.num_heads * model.head_dim;
  Kernels().decode_attention(team, attention);
}

void StepOfRows(Team& team, const DecoderModel& model, const DecodeStepArgs& step,
                std::int64_t first, std::int64_t rows, const Sizes& sizes, const Buffers& buffers) {
  const std::int64_t hidden = sizes.hidden;
  team.For(rows, [&](std::int64_t row) {
    UnpackRow(model.embedding, step.tokens[first + row], buffers.residual + row * hidden);
  });
  for (std::size_t i = 0; i < model.layers.size(); ++i) {
    const DecoderLayer& layer = model.layers[i];
    Norm(team, buffers.residual, layer.input_norm, model, rows, buffers.normed);
    Project(team, layer.qkv, buffers.normed, hidden, rows, layer.qkv_bias, Activation::kNone, false,
            buffers.qkv, sizes.qkv);
    Attend(team, model, step, static_cast<std::int64_t>(i), first, rows, buffers, sizes.qkv);
    Project(team, layer.o, buffers.attended, sizes.attended, rows, nullptr, Activation::kNone, true,
            buffers.residual, hidden);
    Norm(team, buffers.residual, layer.post_norm, model, rows, buffers.normed);
    Project(team, layer.gate_up, buffers.normed, hidden, rows, nullptr, Activation::kSiluMul, false,
            buffers.mlp, sizes.mlp);
    Project(team, layer.down, buffers.mlp, sizes.mlp, rows, nullptr, Activation::kNone, true,
            buffers.residual, hidden);
  }
  Norm(team, buffers.residual, model.norm, model, rows, buffers.normed);
  const std::int64_t vocab_size = model.head.rows;
  float* const logits = step.logits + first * vocab_size;
  Project(team, model.head, buffers.normed, hidden, rows, nullptr, Activation::kNone, false, logits,
          vocab_size);
  ArgmaxArgs argmax{};
  argmax.logits = logits;
  argmax.num_rows = rows;
  argmax.vocab_size = vocab_size;
  argmax.forbidden = step.forbidden;
  argmax.tokens = step.greedy + first;
  Kernels().argmax(team, argmax);
}

}  // namespace

std::size_t DecodeWorkspace(const DecoderModel& model) {
  const Sizes sizes = SizesOf(model);
  return static_cast<std::size_t>(kStepRows *
                                  (2 * sizes.hidden + sizes.qkv + sizes.attended + sizes.mlp));
}

void DecodeStep(Team& team, const DecoderModel& model, const DecodeStepArgs& args,
                float* workspace) {
  const Sizes sizes = SizesOf(model);
  Buffers buffers{};
  buffers.residual = Take(&workspace, sizes.hidden);
  buffers.normed = Take(&workspace, sizes.hidden);
  buffers.qkv = Take(&workspace, sizes.qkv);
  buffers.attended = Take(&workspace, sizes.attended);
  buffers.mlp = Take(&workspace, sizes.mlp);
  for (std::int64_t first = 0; first < args.num_rows; first += kStepRows) {
    const std::int64_t left = args.num_rows - first;
    StepOfRows(team, model, args, first, left < kStepRows ? left : kStepRows, sizes, buffers);
  }
}

}  // namespace ovfast
