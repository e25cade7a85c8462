"""What a request must cost: FLOPs, bytes and the least time a machine could need for them.

Owns the formulas and `Estimate`. Counts multiplications with weights and attention; norms,
activations and sampling are left out, so every floor is one. Knows no devices: the rates of a
machine are given as a `Machine`. One multiply-add is two FLOPs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ovfast.anyres import VisualPlan
from ovfast.config import ModelConfig, TextConfig, VisionConfig


@dataclass(frozen=True, slots=True)
class Machine:
    """Attained rates of one machine at the precision that is used.

    Args:
        read_gb_per_s: memory read rate in 10⁹ bytes per second.
        gflops: matrix product rate in 10⁹ FLOPs per second.
    """

    read_gb_per_s: float
    gflops: float

    def floor_ms(self, flops: float, num_bytes: float) -> float:
        """The least time for so much arithmetic and so many bytes, done at the same time."""
        return max(flops / (self.gflops * 1e6), num_bytes / (self.read_gb_per_s * 1e6))


@dataclass(frozen=True, slots=True)
class Estimate:
    """The cost of one request, from sizes alone.

    Attributes:
        num_views: inputs of the vision tower.
        visual_tokens, text_tokens, prompt_tokens: what the language model reads.
        max_new_tokens: the longest answer that is counted.
        kv_cache_bytes: keys and values of the prompt and the longest answer.
        weight_bytes: all parameters as they are stored.
        vision_flops, projector_flops, prefill_flops: once per request.
        decode_flops_per_token, decode_bytes_per_token: halfway through the longest answer.
        ttft_floor_ms, tpot_floor_ms: least times on the machine; None without a machine.
    """

    num_views: int
    visual_tokens: int
    text_tokens: int
    prompt_tokens: int
    max_new_tokens: int
    kv_cache_bytes: int
    weight_bytes: int
    vision_flops: int
    projector_flops: int
    prefill_flops: int
    decode_flops_per_token: int
    decode_bytes_per_token: int
    ttft_floor_ms: float | None = None
    tpot_floor_ms: float | None = None

    def as_dict(self) -> dict[str, int | float | None]:
        """All fields by name, for JSON."""
        return asdict(self)


def vision_body_params(vision: VisionConfig) -> int:
    """Weights of the tower's layers that are multiplied with (no biases, no norms)."""
    hidden, mlp = vision.hidden_size, vision.intermediate_size
    return vision.num_layers * (4 * hidden * hidden + 2 * hidden * mlp)


def text_body_params(text: TextConfig) -> int:
    """Weights of the language model's layers that are multiplied with."""
    q_size, kv_size = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    attention = text.hidden_size * (2 * q_size + 2 * kv_size)
    return text.num_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def text_head_params(text: TextConfig) -> int:
    """Weights of lm_head, tied or not."""
    return text.vocab_size * text.hidden_size


def vision_flops(vision: VisionConfig, num_views: int) -> int:
    """FLOPs of the tower: patch embedding, matrix products and attention."""
    tokens, hidden = num_views * vision.tokens_per_view, vision.hidden_size
    patches = 2 * tokens * vision.patch_dim * hidden
    products = 2 * tokens * vision_body_params(vision)
    return patches + products + 4 * vision.num_layers * tokens * vision.tokens_per_view * hidden


def projector_flops(config: ModelConfig, plans: Sequence[VisualPlan]) -> int:
    """FLOPs of the projector: fc1 over the kept rows, fc2 over the rows left after pooling."""
    hidden, vision_hidden = config.text.hidden_size, config.vision.hidden_size
    total = 0
    for plan in plans:
        kept = plan.num_frames * plan.tokens_per_view or plan.tokens_per_view
        if plan.has_crops:
            kept += plan.kept_hw[0] * plan.kept_hw[1]
        pooled = plan.num_tokens - plan.num_newlines
        total += 2 * kept * vision_hidden * hidden + 2 * pooled * hidden * hidden
    return total


def prefill_flops(text: TextConfig, num_tokens: int) -> int:
    """FLOPs of a causal prefill whose last position alone goes through lm_head."""
    linear = 2 * num_tokens * text_body_params(text) + 2 * text_head_params(text)
    return linear + 2 * text.num_layers * num_tokens**2 * text.num_heads * text.head_dim


def decode_flops(text: TextConfig, context: int, batch_size: int = 1) -> int:
    """FLOPs of one decode step over `context` cached positions per request."""
    linear = 2 * batch_size * (text_body_params(text) + text_head_params(text))
    return linear + 4 * batch_size * text.num_layers * context * text.num_heads * text.head_dim


def kv_bytes_per_token(text: TextConfig, kv_bytes_per_element: float) -> int:
    """Bytes of the keys and values of one position in all layers."""
    return round(2 * text.num_layers * text.num_kv_heads * text.head_dim * kv_bytes_per_element)


def text_weight_bytes(text: TextConfig, weight_bytes_per_param: float) -> int:
    """Bytes of weights that a decode step or a prefill reads at least once."""
    return round((text_body_params(text) + text_head_params(text)) * weight_bytes_per_param)


def decode_bytes(
    text: TextConfig,
    context: int,
    weight_bytes_per_param: float,
    kv_bytes_per_element: float,
    batch_size: int = 1,
) -> int:
    """Bytes that one decode step reads: the weights once, the cache of each request."""
    cache = batch_size * context * kv_bytes_per_token(text, kv_bytes_per_element)
    return text_weight_bytes(text, weight_bytes_per_param) + cache


def estimate_request(
    config: ModelConfig,
    plans: Sequence[VisualPlan],
    text_tokens: int,
    max_new_tokens: int,
    weight_bytes_per_param: float,
    kv_bytes_per_element: float,
    machine: Machine | None = None,
) -> Estimate:
    """Counts what one request costs.

    Args:
        config: of the checkpoint.
        plans: one for each picture and video of the prompt.
        text_tokens: prompt tokens that are not visual.
        max_new_tokens: longest answer.
        weight_bytes_per_param: 4 for float32, 2 for bfloat16, 0.5625 for int4 in groups of 32.
        kv_bytes_per_element: 4 for float32, 2 for bfloat16.
        machine: measured rates, or None for counts without times.

    Returns:
        The estimate.
    """
    num_views = sum(plan.num_views for plan in plans)
    visual_tokens = sum(plan.num_tokens for plan in plans)
    prompt_tokens = visual_tokens + text_tokens
    context = prompt_tokens + max_new_tokens // 2
    kv_bytes = kv_bytes_per_token(config.text, kv_bytes_per_element)
    step_flops = decode_flops(config.text, context)
    step_bytes = decode_bytes(config.text, context, weight_bytes_per_param, kv_bytes_per_element)
    stages = (
        vision_flops(config.vision, num_views),
        projector_flops(config, plans),
        prefill_flops(config.text, prompt_tokens),
    )
    ttft_floor_ms = tpot_floor_ms = None
    if machine is not None:
        ttft_floor_ms = _ttft_floor_ms(config, stages, weight_bytes_per_param, machine)
        tpot_floor_ms = machine.floor_ms(step_flops, step_bytes)
    return Estimate(
        num_views=num_views,
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        kv_cache_bytes=(prompt_tokens + max_new_tokens) * kv_bytes,
        weight_bytes=round(config.num_parameters * weight_bytes_per_param),
        vision_flops=stages[0],
        projector_flops=stages[1],
        prefill_flops=stages[2],
        decode_flops_per_token=step_flops,
        decode_bytes_per_token=step_bytes,
        ttft_floor_ms=ttft_floor_ms,
        tpot_floor_ms=tpot_floor_ms,
    )


def _ttft_floor_ms(
    config: ModelConfig,
    stages: tuple[int, int, int],
    weight_bytes_per_param: float,
    machine: Machine,
) -> float:
    """The stages run one after the other, and each that runs reads its weights at least once."""
    vision, hidden = config.vision, config.text.hidden_size
    params = (
        vision_body_params(vision) + vision.patch_dim * vision.hidden_size,
        hidden * (vision.hidden_size + hidden),
        text_body_params(config.text) + text_head_params(config.text),
    )
    return sum(
        machine.floor_ms(flops, count * weight_bytes_per_param)
        for flops, count in zip(stages, params, strict=True)
        if flops
    )
