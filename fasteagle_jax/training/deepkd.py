"""DeepKD (arXiv 2505.15133): the distillation gradient in three parts, each with a momentum of its own.

B rows · C positions of a chunk · V draft vocabulary, the classes · K non-target classes that are kept.
With p the target's distribution and q the drafter's, both at temperature T, and y the target's first choice:

    task              CE    = -log q_y                                     (at temperature 1)
    target class      TCKD  = T^2 KL([p_y, 1 - p_y] || [q_y, 1 - q_y])
    non-target class  NCKD  = T^2 (1 - p_y) KL(p^ || q^)                     p^, q^: over the K kept classes

Their gradients (TOG, TCG, NCG) stay apart from the logits to the parameters, where each has its momentum buffer and the
sum of the buffers steps the weights. With T = 1 and all classes kept, TCKD + NCKD has the gradient of the plain loss's
cross entropy. A position whose y is outside of the draft vocabulary has no target class, and none of the three losses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from fasteagle_jax.decoding.sampling import kth_largest
from fasteagle_jax.devices.sharding import constrain_all
from fasteagle_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class DeepKD:
    """Weights, momenta and mask of DeepKD's three parts, in the order task, target class, non-target class.

    Defaults are those of the paper's ImageNet runs where it has any.
    """

    temperature: float = 1.0  # T, of both distributions; the paper has 4 for CIFAR
    task: float = 0.5  # weight of CE; the paper has 0.1 for CIFAR
    target_class: float = 1.0  # weight of TCKD
    non_target: float = 1.0  # weight of NCKD, besides the 1 - p_y of a position
    momenta: tuple[float, float, float] = (0.075, -0.075, 0.075)  # added to the optimiser's first beta
    mask: bool = True  # the dynamic top-k mask; without it all classes are kept
    mask_start: float = 0.05  # share of the non-target classes that are kept at first
    mask_best: int | None = None  # K from the first third to the second; None for half of the non-target classes

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise UserError(f"loss deepkd temperature is {self.temperature}: it must be above 0, e.g. 1")
        for name, weight in zip(Parts._fields, self.weights, strict=True):
            if weight < 0:
                raise UserError(f"loss deepkd {name} is {weight}: a weight must be 0 or more")
        if len(self.momenta) != 3:
            raise UserError(f"loss deepkd momenta are {self.momenta}: give three numbers, e.g. 0.075,-0.075,0.075")
        if not 0 < self.mask_start <= 1:
            raise UserError(f"loss deepkd mask_start is {self.mask_start}: it must be above 0 and at most 1")
        if self.mask_best is not None and self.mask_best < 1:
            raise UserError(f"loss deepkd mask_best is {self.mask_best}: give a number of classes, or None for half")

    @property
    def weights(self) -> tuple[float, float, float]:
        """The three parts' weights."""
        return self.task, self.target_class, self.non_target


class Parts(NamedTuple):
    """One thing (a gradient, a momentum buffer) of each of the three parts."""

    task: Any
    target_class: Any
    non_target: Any

    def total(self) -> Any:
        """The sum of three pytrees of arrays."""
        return jax.tree.map(lambda *parts: sum(parts[1:], parts[0]), *self)


# --- the dynamic top-k mask -------------------------------------------------------------------------------------


def mask_sizes(config: DeepKD, num_classes: int) -> tuple[int, int, int]:
    """K at the start, the best K and K at the end, for V draft classes; UserError if the three do not grow."""
    others = num_classes - 1
    start = max(1, round(config.mask_start * others))
    best = max(start, others // 2) if config.mask_best is None else config.mask_best
    if best > others:
        raise UserError(
            f"loss.deepkd keeps {best} non-target classes and the draft vocabulary of {num_classes} has {others}: "
            f"set loss.deepkd.mask_best to at most {others}, or a larger drafter.draft_vocab_size"
        )
    if best < start:
        raise UserError(
            f"loss.deepkd starts with {start} non-target classes (mask_start {config.mask_start} of {others}), more "
            f"than its best {best}: lower loss.deepkd.mask_start"
        )
    return start, best, others


def num_kept(config: DeepKD, num_classes: int, step: jax.Array, num_steps: int) -> jax.Array | None:
    """K of a step, int32 []; None without a mask.

    It grows linearly from the first K to the best in the first third of the steps, stays in the second, and grows
    linearly to all non-target classes in the last, which the last step keeps.
    """
    if not config.mask:
        return None
    sizes = jnp.asarray(mask_sizes(config, num_classes), jnp.float32)
    done = step / max(num_steps - 1, 1)
    return jnp.round(jnp.interp(done, jnp.asarray([0, 1 / 3, 2 / 3, 1]), sizes[jnp.asarray([0, 1, 1, 2])])).astype(
        jnp.int32
    )


def largest(logits: jax.Array, among: jax.Array, k: jax.Array) -> jax.Array:
    """bool [..., V], the k largest logits of those `among`, bool [..., V]; what ties with the k-th is in."""
    masked = jnp.where(among, logits.astype(jnp.float32), -jnp.inf)
    kth = kth_largest(masked, jnp.minimum(k, masked.shape[-1]))  # -inf if there are fewer than k
    return among & (masked >= kth[..., None])


# --- the three losses -------------------------------------------------------------------------------------------


class Teacher(NamedTuple):
    """What the three losses read of the target's distribution p at positions [B, C]; float32."""

    is_label: jax.Array  # bool [B, C, V]: y
    kept: jax.Array  # bool [B, C, V]: the non-target classes of NCKD
    log_others: jax.Array  # [B, C, V]: log p^; of kept classes alone
    log_label: jax.Array  # [B, C]: log p_y
    log_rest: jax.Array  # [B, C]: log (1 - p_y)
    mass: jax.Array | None  # [B, C]: weight of TCKD and NCKD; None for 1


def teacher(logits: jax.Array, whole: jax.Array | None, config: DeepKD, k: jax.Array | None) -> Teacher:
    """The Teacher of the target's logits [B, C, V] over the draft vocabulary, over which p adds up to 1.

    Args:
      logits: of the draft vocabulary.
      whole: of the target's whole vocabulary, to weight a position by the draft vocabulary's share of the target's
        mass, as the plain cross entropy does; None to weight all alike.
      config: the temperature.
      k: int32 [], non-target classes to keep; None for all.
    """
    # Maxima rather than argmax, as in losses.py; the first of equal ones.
    classes = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    best = jnp.where(logits >= logits.max(axis=-1, keepdims=True), classes, logits.shape[-1])
    is_label = classes == best.min(axis=-1, keepdims=True)
    kept = ~is_label if k is None else largest(logits, ~is_label, k)
    scaled = logits / config.temperature
    of_label, of_rest = _only(scaled, is_label), _logsumexp(scaled, ~is_label)
    log_z = jnp.logaddexp(of_label, of_rest)
    log_others = scaled - _logsumexp(scaled, kept)[..., None]
    mass = None if whole is None else jnp.exp(log_z - jax.nn.logsumexp(whole / config.temperature, axis=-1))
    return Teacher(is_label, kept, log_others, of_label - log_z, of_rest - log_z, mass)


def part_losses(logits: jax.Array, teacher: Teacher, config: DeepKD) -> jax.Array:
    """The weighted CE, TCKD and NCKD, float32 [3, B, C], of a drafter's logits [B, C, V]."""
    cross_entropy = jax.nn.logsumexp(logits, axis=-1) - _only(logits, teacher.is_label)
    scaled = logits / config.temperature
    of_label, of_rest = _only(scaled, teacher.is_label), _logsumexp(scaled, ~teacher.is_label)
    log_z = jnp.logaddexp(of_label, of_rest)
    p_label, p_rest = jnp.exp(teacher.log_label), jnp.exp(teacher.log_rest)
    target_class = p_label * (teacher.log_label - of_label + log_z) + p_rest * (teacher.log_rest - of_rest + log_z)
    log_others = scaled - _logsumexp(scaled, teacher.kept)[..., None]  # log q^
    others = jnp.where(teacher.kept, jnp.exp(teacher.log_others), 0)
    non_target = p_rest * (others * (teacher.log_others - log_others)).sum(axis=-1)
    scale = config.temperature**2 * (1.0 if teacher.mass is None else teacher.mass)
    weighted = zip(config.weights, (cross_entropy, scale * target_class, scale * non_target), strict=True)
    return jnp.stack([weight * loss for weight, loss in weighted])


def _logsumexp(x: jax.Array, where: jax.Array) -> jax.Array:
    return jax.nn.logsumexp(jnp.where(where, x, -jnp.inf), axis=-1)


def _only(x: jax.Array, one: jax.Array) -> jax.Array:
    """The entry of x [..., V] that bool [..., V] marks."""
    return jnp.where(one, x, 0).sum(axis=-1)


# --- three gradients --------------------------------------------------------------------------------------------


def value_and_jacobian(function: Callable[..., Any], argnums: Any = 0, *, has_aux: bool) -> Callable[..., Any]:
    """As jax.value_and_grad(function, argnums, has_aux=True), of a function whose value is [3]: gradients [3, ...]."""
    assert has_aux

    def with_value(*args: Any) -> Any:
        value, aux = function(*args)
        return value, (value, aux)

    def run(*args: Any) -> Any:
        jacobian, found = jax.jacrev(with_value, argnums, has_aux=True)(*args)
        return found, jacobian

    return run


def value_and_parts(function: Callable[[Any], Any], params: Any, *, unroll: bool) -> tuple[Any, Parts]:
    """((losses [3], aux), the gradient of each in `params`) of a function params -> (losses, aux).

    One backward pass a part, one after the other: the activations of one are in memory, and no kernel sees a batch of
    cotangents.
    """
    losses, pull_back, aux = jax.vjp(function, params, has_aux=True)

    def of_part(_: None, cotangent: jax.Array) -> tuple[None, Any]:
        return None, constrain_all(pull_back(cotangent)[0], {})

    _, stacked = jax.lax.scan(of_part, None, jnp.eye(3), unroll=unroll)
    return (losses, aux), Parts(*(jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(3)))


# --- three momenta ----------------------------------------------------------------------------------------------


class MomentaState(NamedTuple):
    """The optimiser's state: three momentum buffers, and what is known of their gradients."""

    num_updates: jax.Array  # int32 []
    momenta: Parts  # pytrees like the parameters
    second: Any  # AdamW's second moment, of the total gradient; None for SGD
    squares: jax.Array  # float32 [3], running means of the gradients' squared norms
    signal_to_noise: jax.Array  # float32 [3], as of the last update; NaN before the second


def split_momenta(
    rate: optax.Schedule,
    decays: tuple[float, float, float],
    *,
    second_decay: float | None,
    weight_decay: float,
    clip_norm: float,
    epsilon: float = 1e-8,
) -> optax.GradientTransformation:
    """The optax transformation whose `update` takes the Parts of a gradient.

    SGD is the paper's rule, v_i <- mu_i v_i + g_i and a step of rate x (v_1 + v_2 + v_3). AdamW has the averages
    m_i <- mu_i m_i + (1 - mu_i) g_i, each corrected for its start at zero, and divides their sum by the root of one
    second moment of the total gradient. With equal decays each is the plain optimiser of the total gradient.

    The signal-to-noise ratio of a part is |E g|^2 / sum Var g over all parameters. Its buffer is a weighted mean of the
    past gradients, with weights that add up to 1 and whose squares add up to w; for independent gradients its squared
    norm is expected to be |E g|^2 + w sum Var g, and the mean of squared norms |E g|^2 + sum Var g, which gives both.
    Each part's estimate looks as far back as its decay does.

    Args:
      rate: the learning rate by the number of updates before.
      decays: mu of the three.
      second_decay: AdamW's second beta; None for SGD.
      weight_decay: of the parameters, apart from the gradients, times the rate.
      clip_norm: the norm of the total gradient above which all three are scaled by one factor.
      epsilon: AdamW's.
    """
    decay = jnp.asarray(decays, jnp.float32)  # [3]

    def init(params: Any) -> MomentaState:
        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        second = None if second_decay is None else zeros()
        return MomentaState(
            jnp.zeros((), jnp.int32),
            Parts(zeros(), zeros(), zeros()),
            second,
            jnp.zeros((3,), jnp.float32),
            jnp.full((3,), jnp.nan, jnp.float32),
        )

    def update(gradients: Any, state: MomentaState, params: Any = None) -> tuple[Any, MomentaState]:
        total = Parts(*gradients).total()
        norm = optax.tree.norm(total)
        # As optax.clip_by_global_norm.
        scale = jnp.where(norm < clip_norm, 1.0, clip_norm / norm)
        gradients = [jax.tree.map(lambda g: g * scale, part) for part in gradients]
        count = state.num_updates + 1
        added = [1.0] * 3 if second_decay is None else [1 - mu for mu in decays]
        momenta = Parts(
            *(
                jax.tree.map(lambda v, g, mu=mu, share=share: mu * v + share * g, buffer, gradient)
                for buffer, gradient, mu, share in zip(state.momenta, gradients, decays, added, strict=True)
            )
        )
        missing = 1 - decay**count  # [3], what the start at zero lacks of a mean's weights
        if second_decay is None:
            second, step = None, momenta.total()
        else:
            second = jax.tree.map(
                lambda old, g: second_decay * old + (1 - second_decay) * (g * scale) ** 2, state.second, total
            )
            of_second = 1 - jnp.float32(second_decay) ** count
            mean = Parts(*(jax.tree.map(lambda m, i=i: m / missing[i], m) for i, m in enumerate(momenta))).total()
            step = jax.tree.map(lambda m, s: m / (jnp.sqrt(s / of_second) + epsilon), mean, second)
        if weight_decay:
            step = jax.tree.map(lambda s, p: s + weight_decay * p, step, params)
        size = rate(state.num_updates)
        updates = jax.tree.map(lambda s: -size * s, step)

        squares = decay * state.squares + (1 - decay) * jnp.stack([optax.tree.norm(g) ** 2 for g in gradients])
        shares = 1.0 if second_decay is not None else 1 - decay
        means = jnp.stack([optax.tree.norm(m) ** 2 for m in momenta]) * (shares / missing) ** 2
        ratio = _signal_to_noise(means, squares / missing, decay, count)
        return updates, MomentaState(count, momenta, second, squares, ratio)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]  # of three gradients


def _signal_to_noise(square_of_mean: jax.Array, mean_square: jax.Array, decay: jax.Array, count: jax.Array) -> Any:
    """|E g|^2 / sum Var g, float32 [3], from |mean g|^2 and mean |g|^2 over `count` gradients; see `split_momenta`.

    At least 0; NaN for one gradient, which has no variance, and for a part without any.
    """
    # The sum of squared weights (1 - mu) mu^k / (1 - mu^count), k < count.
    w = (1 - decay) / (1 + decay) * (1 + decay**count) / (1 - decay**count)
    noise = mean_square - square_of_mean  # (1 - w) sum Var g
    signal = square_of_mean - w * mean_square  # (1 - w) |E g|^2
    return jnp.where((count > 1) & (noise > 0), jnp.maximum(signal, 0) / noise, jnp.nan)
