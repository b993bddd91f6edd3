"""Image towers that read packed patches, against Qwen2.5-VL's and Qwen3-VL's of transformers in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen2_5
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen3_vl import modeling_qwen3_vl as qwen3
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig

from nalora_jax.common import trees
from nalora_jax.models.vision.patch_config import PatchTower
from nalora_jax.models.vision.patch_encoder import PatchEncoder, patch_places, window_numbers

PATCH = 4
MERGE = 2
# Rows and columns of patches of each row's images; the first row is full.
ROWS = [[(4, 10), (2, 2)], [(6, 6)], [(2, 14)]]
PLACES = 44
SIZES = {
    "depth": 3,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 24,
    "patch_size": PATCH,
}
SIZES |= {"spatial_merge_size": MERGE, "temporal_patch_size": 2, "out_hidden_size": 16}
SHARED = {"d_model": 32, "n_layers": 3, "n_heads": 4, "d_ff": 24, "norm_eps": 1e-6}
SHARED |= {"patch_size": PATCH, "frames": 2, "rope_theta": 10000.0}
WINDOWED = PatchTower(
    model_type="qwen2_5_vl",
    activation="silu",
    rms_norm=True,
    gated=True,
    window=2,
    whole_layers=(1,),
    **SHARED,
)
TABLED = PatchTower(
    model_type="qwen3_vl",
    activation="gelu_tanh",
    patch_bias=True,
    table="corners",
    side=5,
    **SHARED,
)


def windowed_tower() -> torch.nn.Module:
    # A window of 16 pixels has 2 by 2 merged patches.
    config = Qwen2_5_VLVisionConfig(
        **SIZES, window_size=16, fullatt_block_indexes=[1], hidden_act="silu"
    )
    return qwen2_5.Qwen2_5_VisionTransformerPretrainedModel(config)


def tabled_tower() -> torch.nn.Module:
    config = Qwen3VLVisionConfig(
        **SIZES,
        num_position_embeddings=25,
        deepstack_visual_indexes=[0, 2],
        hidden_act="gelu_pytorch_tanh",
    )
    return qwen3.Qwen3VLVisionModel(config)


CASES = [(windowed_tower, WINDOWED, ()), (tabled_tower, TABLED, (0, 2))]


def make_reference(make) -> torch.nn.Module:
    torch.manual_seed(0)
    tower = make().float().eval()
    with torch.no_grad():
        for weights in tower.parameters():
            weights.normal_(0, 0.3 if weights.ndim > 1 else 0.5)
    return tower


def make_params(tower: torch.nn.Module, config: PatchTower) -> dict:
    """Returns the tower's weights in this library's tree."""
    state = {name: value.detach().numpy() for name, value in tower.state_dict().items()}
    convolution = state["patch_embed.proj.weight"]  # [d, channels, frames, patch, patch]
    leaves = {"patches/kernel": convolution.transpose(2, 3, 4, 1, 0).reshape(-1, config.d_model)}
    if config.patch_bias:
        leaves["patches/bias"] = state["patch_embed.proj.bias"]
    if config.table != "none":
        leaves["positions/embedding"] = state["pos_embed.weight"]

    def stack(name: str) -> np.ndarray:
        return np.stack([state[f"blocks.{layer}.{name}"] for layer in range(config.n_layers)])

    for ours, theirs in (("attn_norm", "norm1"), ("ffn_norm", "norm2")):
        leaves[f"layers/{ours}/scale"] = stack(f"{theirs}.weight")
        if not config.rms_norm:
            leaves[f"layers/{ours}/bias"] = stack(f"{theirs}.bias")
    kernels = np.split(stack("attn.qkv.weight"), 3, axis=1)
    biases = np.split(stack("attn.qkv.bias"), 3, axis=1)
    for name, kernel, bias in zip("qkv", kernels, biases, strict=True):
        leaves[f"layers/attn/{name}_proj/kernel"] = kernel.swapaxes(1, 2)
        leaves[f"layers/attn/{name}_proj/bias"] = bias
    dense = {"attn/o_proj": "attn.proj"}
    if config.gated:
        dense |= {f"ffn/{name}_proj": f"mlp.{name}_proj" for name in ("gate", "up", "down")}
    else:
        dense |= {"ffn/in_proj": "mlp.linear_fc1", "ffn/out_proj": "mlp.linear_fc2"}
    for ours, theirs in dense.items():
        leaves[f"layers/{ours}/kernel"] = stack(f"{theirs}.weight").swapaxes(1, 2)
        leaves[f"layers/{ours}/bias"] = stack(f"{theirs}.bias")
    assert {path: leaf.shape for path, leaf in leaves.items()} == config.param_shapes()
    return trees.unflatten(jax.tree.map(jnp.asarray, leaves))


def draw_rows() -> tuple[np.ndarray, np.ndarray]:
    """Returns patches ``[rows, patches, patch * patch * 3]``, noise after a row's images, and grids."""
    patches = np.random.default_rng(0).normal(size=(len(ROWS), PLACES, PATCH**2 * 3))
    grids = np.zeros((len(ROWS), 2, 2), np.int32)
    for row, images in enumerate(ROWS):
        grids[row, : len(images)] = images
    return patches.astype(np.float32), grids


def reference_features(tower, patches: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
    """Returns the output of every layer for one image, ``[patches, d]`` in the order of its patches."""
    # [patches, patch, patch, channels] -> [patches, channels * frames * patch * patch]
    squares = patches.reshape(-1, PATCH, PATCH, 3).permute(0, 3, 1, 2)
    frames = squares[:, :, None].repeat(1, 1, 2, 1, 1).reshape(len(patches), -1)
    outputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda *call: outputs.append(call[2])) for block in tower.blocks
    ]
    tower(frames, torch.tensor([[1, *grid]]))
    for hook in hooks:
        hook.remove()
    if not hasattr(tower, "window_size"):
        return outputs
    index, _ = qwen2_5.get_vision_window_index(
        torch.tensor([[1, *grid]]), spatial_merge_size=MERGE, window_size=16, patch_size=PATCH
    )
    back = torch.argsort(index)
    return [x.reshape(len(back), MERGE**2, -1)[back].reshape(len(patches), -1) for x in outputs]


@pytest.mark.parametrize(("make", "config", "taps"), CASES, ids=["windows", "table"])
def test_features_of_packed_images_are_those_of_each_alone(make, config, taps):
    tower = make_reference(make)
    variables = {"params": make_params(tower, config)}
    patches, grids = draw_rows()
    encoder = PatchEncoder(config, MERGE, taps)
    features, tapped = jax.jit(encoder.apply)(variables, jnp.asarray(patches), jnp.asarray(grids))
    for row, images in enumerate(ROWS):
        start = 0
        for grid in images:
            end = start + grid[0] * grid[1]
            expected = reference_features(tower, torch.tensor(patches[row, start:end]), grid)
            expected = [x.detach() for x in expected]
            scale = float(expected[-1].abs().max())
            np.testing.assert_allclose(features[row, start:end], expected[-1], atol=2e-5 * scale)
            for number, layer in enumerate(taps):
                of_layer = tapped[number, row, start:end]
                np.testing.assert_allclose(of_layer, expected[layer], atol=2e-5 * scale)
            start = end


@pytest.mark.parametrize(("make", "config", "taps"), CASES, ids=["windows", "table"])
def test_gradients_with_respect_to_patches_are_those_of_torch(make, config, taps):
    tower = make_reference(make)
    variables = {"params": make_params(tower, config)}
    grid = (4, 6)
    patches = np.random.default_rng(1).normal(size=(24, PATCH**2 * 3)).astype(np.float32)
    weights = np.random.default_rng(2).normal(size=(24, config.d_model)).astype(np.float32)
    encoder = PatchEncoder(config, MERGE)

    def total(x: jax.Array) -> jax.Array:
        features, _ = encoder.apply(variables, x[None], jnp.array([[grid]], jnp.int32))
        return jnp.sum(features[0] * weights)

    ours = jax.jit(jax.grad(total))(jnp.asarray(patches))
    theirs = torch.tensor(patches, requires_grad=True)
    features = reference_features(tower, theirs, grid)[-1]
    (features * torch.tensor(weights)).sum().backward()
    np.testing.assert_allclose(ours, theirs.grad, atol=1e-4 * float(theirs.grad.abs().max()))


def test_padding_and_other_images_have_windows_of_their_own():
    _, grids = draw_rows()
    places = patch_places(jnp.asarray(grids), PLACES, MERGE)
    numbers = np.asarray(window_numbers(places, 4))
    image = np.asarray(places.image)
    assert (numbers[image == 0] == 0).all()
    assert (image[1, :36] == 1).all()
    assert (image[1, 36:] == 0).all()
    # 4 by 10 patches have 1 by 3 windows of 4 by 4, and 2 by 2 patches one.
    assert len(set(numbers[0])) == 4
    assert set(numbers[0, :40]).isdisjoint(numbers[0, 40:44])
