"""What a request must cost: FLOPs, bytes, the least time for them, and the time they will take.

Owns the formulas and `Estimate`. Counts multiplications with weights and attention; norms,
activations and sampling are left out, so every floor is one. Knows no devices: what a machine can
do is given as a `Machine`. One multiply-add is two FLOPs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from ovfast.anyres import VisualPlan
from ovfast.config import ModelConfig, TextConfig, VisionConfig
from ovfast.stage_cost import Machine, Stage

__all__ = [
    "Estimate",
    "Machine",
    "Stage",
    "decode_bytes",
    "decode_flops",
    "decode_stage",
    "estimate_request",
    "kv_bytes_per_token",
    "megapixels",
    "parameter_bytes",
    "prefill_flops",
    "prefill_stage",
    "projector_flops",
    "projector_stage",
    "request_stages",
    "text_body_params",
    "text_head_params",
    "text_weight_bytes",
    "tower_stage",
    "vision_body_params",
    "vision_flops",
]


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
        ttft_ms, tpot_ms: predicted times, from a picture as JPEG bytes in memory on; None without
            the rates of a machine.
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
    ttft_ms: float | None = None
    tpot_ms: float | None = None

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
    return tower_stage(vision, num_views, 0).flops


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
    """FLOPs of a causal prefill whose last position alone is needed.

    So of the last layer all positions need keys and values alone, the last position the rest.
    """
    return prefill_stage(text, num_tokens, 0).flops


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


def parameter_bytes(
    config: ModelConfig, weight_bytes_per_param: float, other_bytes_per_param: float | None = None
) -> int:
    """Bytes of all parameters.

    Args:
        config: of the checkpoint.
        weight_bytes_per_param: of the language model's linear layers.
        other_bytes_per_param: of the rest, where that is kept in another way; then a tied head is
            a copy of its own beside the embedding.
    """
    if other_bytes_per_param is None:
        return round(config.num_parameters * weight_bytes_per_param)
    body, head = text_body_params(config.text), text_head_params(config.text)
    rest = config.num_parameters - body - (0 if config.text.tie_word_embeddings else head)
    return round((body + head) * weight_bytes_per_param + rest * other_bytes_per_param)


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


def tower_stage(vision: VisionConfig, num_views: int, weight_bytes_per_param: float) -> Stage:
    """The tower over views."""
    tokens, hidden = num_views * vision.tokens_per_view, vision.hidden_size
    params = vision_body_params(vision) + vision.patch_dim * hidden
    attention = 4 * vision.num_layers * tokens * vision.tokens_per_view * hidden
    return Stage(
        "tower",
        product_flops=2 * tokens * params,
        attention_flops=attention,
        weight_bytes=round(params * weight_bytes_per_param) if num_views else 0,
        num_layers=vision.num_layers,
        num_views=num_views,
    )


def projector_stage(
    config: ModelConfig, plans: Sequence[VisualPlan], weight_bytes_per_param: float
) -> Stage:
    """The projector over the features of pictures and videos."""
    hidden = config.text.hidden_size
    params = hidden * (config.vision.hidden_size + hidden) if plans else 0
    return Stage(
        "projector",
        product_flops=projector_flops(config, plans),
        attention_flops=0,
        weight_bytes=round(params * weight_bytes_per_param),
    )


def prefill_stage(text: TextConfig, num_tokens: int, weight_bytes_per_param: float) -> Stage:
    """The language model over a prompt of which the last position's logits are needed."""
    layer, head = text_body_params(text) // text.num_layers, text_head_params(text)
    keys_values = 2 * text.hidden_size * text.num_kv_heads * text.head_dim
    rows = num_tokens * ((text.num_layers - 1) * layer + keys_values) + layer - keys_values + head
    full = (text.num_layers - 1) * num_tokens**2 + 2 * num_tokens
    return Stage(
        "prefill",
        product_flops=2 * rows,
        attention_flops=2 * full * text.num_heads * text.head_dim,
        weight_bytes=text_weight_bytes(text, weight_bytes_per_param),
        num_layers=text.num_layers,
    )


def decode_stage(
    text: TextConfig,
    context: int,
    weight_bytes_per_param: float,
    kv_bytes_per_element: float,
    batch_size: int = 1,
) -> Stage:
    """One decode step of requests with `context` cached positions each."""
    params = text_body_params(text) + text_head_params(text)
    products = 2 * batch_size * params
    return Stage(
        "decode",
        product_flops=products,
        attention_flops=decode_flops(text, context, batch_size) - products,
        weight_bytes=text_weight_bytes(text, weight_bytes_per_param),
        cache_bytes=batch_size * context * kv_bytes_per_token(text, kv_bytes_per_element),
        num_layers=text.num_layers,
    )


def request_stages(
    config: ModelConfig,
    plans: Sequence[VisualPlan],
    text_tokens: int,
    weight_bytes_per_param: float,
    other_bytes_per_param: float | None = None,
) -> tuple[Stage, ...]:
    """What runs before the first token, in order; text alone has no tower and no projector."""
    if other_bytes_per_param is None:
        other_bytes_per_param = weight_bytes_per_param
    num_views = sum(plan.num_views for plan in plans)
    prompt_tokens = text_tokens + sum(plan.num_tokens for plan in plans)
    prefill = prefill_stage(config.text, prompt_tokens, weight_bytes_per_param)
    if not plans:
        return (prefill,)
    return (
        tower_stage(config.vision, num_views, other_bytes_per_param),
        projector_stage(config, plans, other_bytes_per_param),
        prefill,
    )


def megapixels(plans: Sequence[VisualPlan]) -> float:
    """Millions of pixels of the pictures and frames of plans, as they come."""
    return sum(p.size_hw[0] * p.size_hw[1] * max(1, p.num_frames) for p in plans) / 1e6


def estimate_request(
    config: ModelConfig,
    plans: Sequence[VisualPlan],
    text_tokens: int,
    max_new_tokens: int,
    weight_bytes_per_param: float,
    kv_bytes_per_element: float,
    machine: Machine | None = None,
    *,
    other_bytes_per_param: float | None = None,
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
        other_bytes_per_param: of all but the language model's linear layers, where these are in
            float8; None: the same.

    Returns:
        The estimate.
    """
    visual_tokens = sum(plan.num_tokens for plan in plans)
    prompt_tokens = visual_tokens + text_tokens
    kv_bytes = kv_bytes_per_token(config.text, kv_bytes_per_element)
    stages = request_stages(
        config, plans, text_tokens, weight_bytes_per_param, other_bytes_per_param
    )
    flops = {stage.name: stage.flops for stage in stages}
    step = decode_stage(
        config.text,
        prompt_tokens + max_new_tokens // 2,
        weight_bytes_per_param,
        kv_bytes_per_element,
    )
    estimate = Estimate(
        num_views=sum(plan.num_views for plan in plans),
        visual_tokens=visual_tokens,
        text_tokens=text_tokens,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
        kv_cache_bytes=(prompt_tokens + max_new_tokens) * kv_bytes,
        weight_bytes=parameter_bytes(config, weight_bytes_per_param, other_bytes_per_param),
        vision_flops=flops.get("tower", 0),
        projector_flops=flops.get("projector", 0),
        prefill_flops=flops["prefill"],
        decode_flops_per_token=step.flops,
        decode_bytes_per_token=step.num_bytes,
    )
    return estimate if machine is None else _with_times(estimate, stages, step, plans, machine)


def _with_times(
    estimate: Estimate,
    stages: Sequence[Stage],
    step: Stage,
    plans: Sequence[VisualPlan],
    machine: Machine,
) -> Estimate:
    """Floors, and predictions where there are rates; stages run one after the other."""
    estimate = replace(
        estimate,
        ttft_floor_ms=sum(stage.floor_ms(machine) for stage in stages),
        tpot_floor_ms=step.floor_ms(machine),
    )
    rates = machine.rates
    if rates is None:
        return estimate
    pictures_ms = megapixels(plans) * rates.picture_ms_per_megapixel
    return replace(
        estimate,
        ttft_ms=rates.request_ms + pictures_ms + sum(s.predicted_ms(rates) for s in stages),
        tpot_ms=step.predicted_ms(rates),
    )
