"""Preparation on a local Ray cluster of two workers, one of them killed in the middle."""

import collections
import dataclasses
import os
import signal
import sys
import threading
import time

import pytest
import tiny_checkpoint
import tiny_media as tiny
from test_latents import SETTINGS, all_records, files, media_folder

from apt_jax.data import manifest, prepare
from apt_jax.data.text_encoders import load_text_encoder
from apt_jax.data.vae_codec import VaeCodec
from apt_jax.errors import UserError

if "ray" not in sys.modules:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'apt_jax[ray]'")
import ray  # noqa: E402

pytestmark = pytest.mark.ray
SMALL = dataclasses.replace(SETTINGS, shard_records=1)


@pytest.fixture(scope="module")
def cluster():
    """Two CPUs, so two workers; workers find the stand-in encoders of these tests."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
             object_store_memory=2**27)
    ray.cloudpickle.register_pickle_by_value(tiny)
    yield
    ray.cloudpickle.unregister_pickle_by_value(tiny)
    ray.shutdown()


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    root = tmp_path_factory.mktemp("ray")
    prepare.prepare(media_folder(root / "in"), root / "out", SMALL, encoder=tiny.HashEncoder(),
                    codec=tiny.PoolCodec(), progress=False)
    return root


def calls(log):
    return [int(line.split()[0]) for line in log.read_text().splitlines()] if log.exists() else []


def kill_one(log, killed, stop, told):
    """Kills a worker once both have begun and one has finished something; then writes `told`."""
    while not stop.is_set():
        begun = collections.Counter(calls(log))
        if len(begun) == 2 and sum(begun.values()) >= 4:
            killed.append(begun.most_common(1)[0][0])
            os.kill(killed[0], signal.SIGKILL)
            told.write_text("")
            return
        time.sleep(0.01)


def test_a_killed_worker_loses_and_doubles_nothing(cluster, local, tmp_path):
    log, told, killed, stop = tmp_path / "log", tmp_path / "told", [], threading.Event()
    killer = threading.Thread(target=kill_one, args=(log, killed, stop, told), daemon=True)
    killer.start()
    try:
        prepare.prepare(local / "in", tmp_path / "out", SMALL, encoder=tiny.HashEncoder(),
                        codec=tiny.PoolCodec(log=str(log), seconds=0.15, wait=str(told)),
                        progress=False, engine="ray", workers=2, threads=1)
    finally:
        stop.set()
        killer.join()
    made = manifest.load(tmp_path / "out", check_hashes=True)
    assert killed and os.getpid() not in calls(log)
    assert len(set(calls(log))) == 3  # the two, and the one in the killed one's place
    records = [(r.source, r.start) for _, r in all_records(tmp_path / "out")]
    assert len(records) == len(set(records)) == sum(made.splits.values())
    assert files(tmp_path / "out") == files(local / "out")  # nothing half-written is left either


def test_an_interrupted_run_on_ray_goes_on_here(cluster, local, tmp_path, monkeypatch):
    real, noted = prepare.write_text, []

    def interrupting(path, text):
        if path.name.endswith(".arrayrecord.json"):
            noted.append(path.name)
            if len(noted) > 4:
                raise KeyboardInterrupt
        real(path, text)

    monkeypatch.setattr(prepare, "write_text", interrupting)
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(local / "in", tmp_path / "out", SMALL, encoder=tiny.HashEncoder(),
                        codec=tiny.PoolCodec(), progress=False, engine="ray", workers=1)
    monkeypatch.undo()
    log = tmp_path / "log"
    prepare.prepare(local / "in", tmp_path / "out", SMALL, encoder=tiny.HashEncoder(),
                    codec=tiny.PoolCodec(log=str(log)), progress=False)
    assert files(tmp_path / "out") == files(local / "out")
    shards = sum(len(b.shards) for b in manifest.load(local / "out").buckets)
    assert len(calls(log)) == shards - 4  # those of the first run were kept


def test_no_cluster_at_the_address_is_one_line():
    from apt_jax.data import ray_engine

    with pytest.raises(UserError, match="no Ray cluster at 127.0.0.1:1 .*ray start --head"):
        ray_engine._connect(ray, "127.0.0.1:1", 0)


def test_a_checkpoint_named_from_here_is_found_by_a_worker_elsewhere(
    cluster, tmp_path, monkeypatch
):
    """The VAE and text encoder themselves; what a worker writes is what this process writes."""
    tiny_checkpoint.save_checkpoint(tmp_path / "ckpt")
    tiny.image_folder(tmp_path / "in", 2)
    monkeypatch.chdir(tmp_path)  # the cluster, and so its workers, began in another folder
    settings = dataclasses.replace(SMALL, sizes=((16, 16),), image_sizes=(), frames=(1,),
                                   holdout=0.0, shard_records=2, negative_prompt=None)
    for engine in ("ray", "local"):
        prepare.prepare("in", engine, settings, encoder=load_text_encoder("ckpt", "float32"),
                        codec=VaeCodec("ckpt", dtype="float32"), progress=False, engine=engine,
                        workers=int(engine == "ray"))
    assert files(tmp_path / "ray") == files(tmp_path / "local")
    assert manifest.load("ray").splits == {"train": 2}


class Deadly(tiny.PoolCodec):
    """Ends every worker that encodes with it."""

    def encode(self, frames):
        os._exit(1)


def test_work_that_ends_every_worker_is_named(cluster, local, tmp_path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with pytest.raises(UserError, match="3 Ray workers ended at .*arrayrecord"):
        prepare.prepare(local / "in", tmp_path / "out", SMALL, encoder=tiny.HashEncoder(),
                        codec=Deadly(), progress=False, engine="ray", workers=1)


def test_too_many_workers(cluster, local, tmp_path):
    with pytest.raises(UserError, match="ask for 2"):
        prepare.prepare(local / "in", tmp_path / "out", SMALL, encoder=tiny.HashEncoder(),
                        codec=tiny.PoolCodec(), progress=False, engine="ray", workers=3)


def refuse(*_):
    raise UserError("there is no folder ckpt")


class Absent(tiny.PoolCodec):
    """Weights that only this machine has."""

    def __reduce__(self):
        return refuse, ()


def test_workers_that_cannot_start_are_one_line(cluster, local, tmp_path):
    with pytest.raises(UserError, match="no Ray worker can be started") as caught:
        prepare.prepare(local / "in", tmp_path / "out", SMALL, encoder=tiny.HashEncoder(),
                        codec=Absent(), progress=False, engine="ray", workers=1)
    assert "no folder ckpt" in str(caught.value) and "\n" not in str(caught.value)
