"""NA-LoRA on one page: a tiny gated Transformer, LoRA, the channel statistics, three rules,
training.

This file needs only jax and optax and is not used by the library. Its functions have the
same names as in `nalora_jax.method`, and its rules the same names as in `--mechanisms`. Over 12
steps in float32 its updates equal the library's (tests/test_change_one_thing.py).
Run it: python docs/nalora_minimal.py

Shapes: B rows, T tokens, D model width, F feed-forward width, L layers, R rank, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Config(NamedTuple):
    vocab: int = 64
    d_model: int = 32
    d_ff: int = 96
    layers: int = 2
    heads: int = 2
    rank: int = 4
    alpha: float = 8.0
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    rule: str = "curvature_cap"  # "none", "squared", "homogeneity" or "curvature_cap"
    warmup: int = 3  # steps before the rule acts
    decay: float = 0.95  # of the moving averages


# ---------------------------------------------------------------- SiLU: phi(z) = rho(z) z


rho = jax.nn.sigmoid
drho = lambda z: rho(z) * (1 - rho(z))  # noqa: E731
phi = lambda z: rho(z) * z  # noqa: E731
dphi = lambda z: rho(z) + z * drho(z)  # noqa: E731

# phi'(z0) = 0, and h(z) = z phi'(z) / phi(z) is within 0.05 of 1 above z1. They cut the line into
# the regions inverted, contracting, expanding and linear.
Z0, Z1 = -1.2784645, 4.4853354


# ---------------------------------------------------------------- LoRA with the gated gradient of A


@jax.custom_vjp
def low_rank(x, a, b, scale, mask):
    """Returns scale (x A) B. The mask [d_out] changes the gradient of A only."""
    return scale * (x @ a) @ b


def low_rank_bwd(saved, g):
    x, a, b, scale, mask = saved
    dx = scale * (g @ b.T) @ a.T
    da = scale * jnp.einsum("bti,btr->ir", x, g @ (b * mask).T)
    db = scale * jnp.einsum("btr,bto->ro", x @ a, g)
    return dx, da, db, jnp.zeros_like(scale), jnp.zeros_like(mask)


low_rank.defvjp(lambda *args: (low_rank(*args), args), low_rank_bwd)


def adapted_dense(p, lora, x, scale, mask=None):
    """Returns the frozen output and the adapter's: x W and scale (x A) B."""
    mask = jnp.ones(p["kernel"].shape[1]) if mask is None else mask
    return x @ p["kernel"], low_rank(x, lora["a"], lora["b"], jnp.asarray(scale), mask)


# ---------------------------------------------------------------- the feed-forward block


def gated_mlp(p, lora, x, scale, mask):
    """Returns (phi(x W_gate) * x W_up) W_down and the statistics of the gate's channels."""
    z_base, dz = adapted_dense(p["gate_proj"], lora["gate_proj"], x, scale, mask)
    z, u = z_base + dz, sum(adapted_dense(p["up_proj"], lora["up_proj"], x, scale))
    y = sum(adapted_dense(p["down_proj"], lora["down_proj"], phi(z) * u, scale))
    return y, jax.lax.stop_gradient(channel_statistics(z, z - dz, dz))


def channel_statistics(z, z_base, dz):
    """Returns means over tokens, [F] each and [4, F] for the occupancy of the regions."""
    mean = functools.partial(jnp.mean, axis=(0, 1))
    # phi(z + dz) - phi(z) = F + S. The excess X = S - z rho'(z) dz is what the gradient does not
    # see.
    selection = (rho(z_base + dz) - rho(z_base)) * (z_base + dz)
    excess = selection - z_base * drho(z_base) * dz
    regions = (z < Z0, (z >= Z0) & (z < 0), (z >= 0) & (z < Z1), z >= Z1)
    return {
        "slope": mean(jnp.abs(dphi(z))),
        "occupancy": jnp.stack([mean(region.astype(z.dtype)) for region in regions]),
        "excess": mean(jnp.abs(excess)),
        "response": mean(jnp.abs(dphi(z_base) * dz)),
        # misalignment of a channel: E|S| / E|F|
        "feature": mean(jnp.abs(rho(z_base) * dz)),
        "selection": mean(jnp.abs(selection)),
    }


# ---------------------------------------------------------------- the rules: one factor per channel


def relative(x):
    mean = jnp.mean(x, -1, keepdims=True)
    return jnp.where(mean > 0, x / jnp.where(mean > 0, mean, 1), 1)


def soft_mask(importance, power=2.0, low=0.0, high=4.0):
    """Mechanism 1: responsive channels take longer steps."""
    return jnp.clip(relative(importance) ** power, low, high)


def homogeneity_scale(occupancy, gains=(0.5, 0.75, 1.0, 1.0)):
    """Mechanism 2: the mean gain of the occupied regions; smaller where phi is far from linear."""
    return relative(jnp.einsum("k,lkf->lf", jnp.array(gains), occupancy))


def curvature_cap(excess, response, tau=0.1):
    """The default: shorter steps where the response of the update is no longer linear."""
    responds = (excess > 0) & (response > 0)
    return jnp.where(
        responds, jnp.minimum(1, tau * response / jnp.where(responds, excess, 1)), 1
    )


def equalized(factor):
    """Returns the factor over its root mean square, so that it is not a hidden learning rate."""
    return factor / jnp.sqrt(jnp.mean(factor**2, -1, keepdims=True))


def channel_factors(averages, step, config):
    """Returns the factor of B's columns and the mask of A's gradient, [L, F] each."""
    factor = mask = ones = jnp.ones_like(averages["slope"])
    if config.rule == "squared":
        factor = mask = equalized(soft_mask(averages["slope"]))
    elif config.rule == "homogeneity":
        factor = equalized(homogeneity_scale(averages["occupancy"]))
    elif config.rule == "curvature_cap":
        factor = curvature_cap(averages["excess"], averages["response"])
    acts = step >= config.warmup
    return jnp.where(acts, factor, ones), jnp.where(acts, mask, ones)


# ---------------------------------------------------------------- the model


def rms_norm(x, scale, eps):
    return scale * x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + eps)


def rope(x, theta):
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def attention(p, x, config):
    q, k, v = (x @ p[f"{name}_proj"]["kernel"] for name in "qkv")
    q, k, v = (y.reshape(*x.shape[:2], config.heads, -1) for y in (q, k, v))
    rotated = (rope(y, config.rope_theta) for y in (q, k))
    scores = jnp.einsum("bqhd,bkhd->bhqk", *rotated) / q.shape[-1] ** 0.5
    causal = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)
    return out @ p["o_proj"]["kernel"]


def loss_and_statistics(lora, params, tokens, masks, config):
    """Returns the mean cross-entropy of the next tokens and the statistics of all layers."""

    def layer(x, inputs):
        p, adapters, mask = inputs
        x = x + attention(
            p["attn"], rms_norm(x, p["attn_norm"]["scale"], config.eps), config
        )
        normed = rms_norm(x, p["ffn_norm"]["scale"], config.eps)
        y, stats = gated_mlp(
            p["ffn"], adapters["ffn"], normed, config.alpha / config.rank, mask
        )
        return x + y, stats

    embedding = params["embed"]["embedding"]
    inputs = (params["layers"], lora["layers"], masks)
    x, stats = jax.lax.scan(layer, embedding[tokens[:, :-1]], inputs)
    logits = rms_norm(x, params["final_norm"]["scale"], config.eps) @ embedding.T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.mean(losses), stats


# ---------------------------------------------------------------- training


class State(NamedTuple):
    step: jax.Array
    lora: dict
    opt_state: optax.OptState
    averages: dict


def init_state(lora, optimizer, config):
    names = ("slope", "excess", "response", "feature", "selection")
    averages = {name: jnp.zeros((config.layers, config.d_ff)) for name in names}
    averages["occupancy"] = jnp.zeros((config.layers, 4, config.d_ff))
    return State(jnp.zeros((), jnp.int32), lora, optimizer.init(lora), averages)


def train_step(params, state, tokens, optimizer, config):
    """Returns the next state and the loss; the factors come from the averages of the steps
    before."""
    factor, mask = channel_factors(state.averages, state.step, config)
    gradient = jax.value_and_grad(loss_and_statistics, has_aux=True)
    (loss, stats), grads = gradient(state.lora, params, tokens, mask, config)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
    # After the preconditioner: Adam would undo a constant factor before it.
    b = updates["layers"]["ffn"]["gate_proj"]["b"]  # [L, R, F]
    updates["layers"]["ffn"]["gate_proj"]["b"] = b * factor[:, None, :]
    lora = optax.apply_updates(state.lora, updates)
    # Bias-corrected exponential moving averages.
    rate = (1 - config.decay) / (1 - config.decay ** (state.step + 1))
    averages = jax.tree.map(
        lambda old, new: old + rate * (new - old), state.averages, stats
    )
    return State(state.step + 1, lora, opt_state, averages), loss


def init(key, config):
    """Returns random frozen weights, and adapters with B = 0."""
    c, keys = config, iter(jax.random.split(key, 16))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[-2] ** -0.5  # noqa: E731
    kernel = lambda d_in, d_out: {"kernel": normal(c.layers, d_in, d_out)}  # noqa: E731
    norm = {"scale": jnp.ones((c.layers, c.d_model))}
    wide, narrow = (c.d_model, c.d_ff), (c.d_ff, c.d_model)
    widths = {"gate_proj": wide, "up_proj": wide, "down_proj": narrow}
    layers = {
        "attn": {f"{name}_proj": kernel(c.d_model, c.d_model) for name in "qkvo"},
        "attn_norm": norm,
        "ffn_norm": norm,
        "ffn": {name: kernel(*shape) for name, shape in widths.items()},
    }
    params = {
        "embed": {"embedding": jax.random.normal(next(keys), (c.vocab, c.d_model))},
        "layers": layers,
        "final_norm": {"scale": jnp.ones(c.d_model)},
    }
    adapters = {
        name: {
            "a": normal(c.layers, d_in, c.rank),
            "b": jnp.zeros((c.layers, c.rank, d_out)),
        }
        for name, (d_in, d_out) in widths.items()
    }
    return params, {"layers": {"ffn": adapters}}


if __name__ == "__main__":
    config = Config()
    params, lora = init(jax.random.key(0), config)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(4e-3))
    state = init_state(lora, optimizer, config)
    step = jax.jit(functools.partial(train_step, optimizer=optimizer, config=config))
    tokens = jax.random.randint(jax.random.key(1), (8, 33), 0, config.vocab)
    for i in range(60):
        state, loss = step(params, state, tokens)
        misalignment = state.averages["selection"].sum(-1) / state.averages[
            "feature"
        ].sum(-1)
        print(f"step {i:3}: loss {loss:.3f}, misalignment of each layer {misalignment}")
