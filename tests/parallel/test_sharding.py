"""The sharding table: what is cut, what is never cut, and that everything follows its parameter."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from apt_jax.parallel.mesh import make_mesh
from apt_jax.parallel.sharding import init_sharded, path_string, spec_for


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"replica": 2, "fsdp": 4})


@pytest.mark.parametrize(("path", "shape", "spec"), [
    ("text_in/kernel", (512, 256), P("fsdp")),
    ("text_in/kernel", (256, 512), P(None, "fsdp")),
    ("text_in/kernel", (256, 256), P(None, "fsdp")),
    ("text_in/kernel", (257, 4096), P(None, "fsdp")),
    ("text_in/kernel", (4096, 255), P("fsdp")),
    ("text_in/kernel", (4097, 255), P()),
    ("text_in/bias", (256,), P()),  # too small to be worth a gather
    ("backbone/blocks/qkv/kernel", (4096, 64, 128), P(None, None, "fsdp")),
    ("generator_opt/0/nu/backbone/blocks/qkv/kernel", (36, 4096, 64), P(None, "fsdp")),
    ("backbone/blocks/qkv/kernel", (4096, 63, 129), P()),
    ("heads/q/kernel", (4, 512, 128), P(None, "fsdp")),
    ("step", (), P()),
])
def test_spec(mesh, path, shape, spec):
    assert spec_for(path, shape, mesh) == spec


@pytest.mark.parametrize(("path", "shape", "spec"), [
    ("generator/backbone/blocks/video/qkv/kernel", (4, 512, 1536), P(None, ("fsdp", "context"),
                                                                     "tensor")),
    ("generator/backbone/blocks/text/mlp/down/kernel", (4, 1536, 512), P(None, "tensor",
                                                                         ("fsdp", "context"))),
    ("generator_opt/0/nu/backbone/blocks/video/out/kernel", (4, 512, 512),
     P(None, "tensor", ("fsdp", "context"))),
    ("backbone/blocks/attn/q/kernel", (4, 512, 512), P(None, ("fsdp", "context"), "tensor")),
    ("backbone/blocks/mlp/down/kernel", (4, 1536, 512), P(None, "tensor", ("fsdp", "context"))),
    ("discriminator/heads/kv/kernel", (3, 512, 1024), P(None, ("fsdp", "context"), "tensor")),
    ("backbone/blocks/video/qkv/bias", (4, 1536), P(None, "tensor")),
    ("backbone/blocks/video/qkv/kernel", (4, 510, 1535), P(None, "fsdp")),
    ("backbone/text_in/kernel", (512, 256), P(("fsdp", "context"))),
    ("backbone/time/out/kernel", (510, 255), P("fsdp")),
])
def test_tensor_comes_from_the_table_and_context_shards_parameters_too(path, shape, spec):
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})
    assert spec_for(path, shape, mesh) == spec


def test_one_fsdp_device_shards_nothing():
    mesh = make_mesh({"replica": 8, "fsdp": 1})
    assert spec_for("text_in/kernel", (512, 512), mesh) == P()


def test_arrays_are_born_sharded_and_moments_follow(mesh):
    def init(key):
        params = {"blocks": {"w": jax.random.normal(key, (3, 128, 256))}}
        return {"params": params, "opt": {"nu": jax.tree.map(jnp.zeros_like, params)}}

    tree, shardings = init_sharded(init, jax.random.key(0), mesh=mesh)
    assert jax.tree.leaves(shardings)[0].spec == P(None, None, "fsdp")
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert path_string(path).endswith("blocks/w")
        assert leaf.sharding.spec == P(None, None, "fsdp")
        assert leaf.addressable_shards[0].data.shape == (3, 128, 64)
