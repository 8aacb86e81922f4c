"""Checkpoints on S3: a real server of its protocol on this machine."""

import pytest
import torch

import puretrain as pt
from puretrain.checkpoint import places, store
from puretrain.errors import CheckpointError
from puretrain.tree import tree_digest

pytest.importorskip("s3fs")
moto_server = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket():
    import boto3

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        server = moto_server.ThreadedMotoServer(port=0, verbose=False)
        server.start()
        host, port = server.get_host_and_port()
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield "s3://bucket"
        server.stop()


def tree(step=0):
    return {"w": torch.arange(3_000_000, dtype=torch.float32), "step": step}  # two parts


def test_save_and_load(bucket):
    url = f"{bucket}/runs/a.ckpt"
    pt.save(url, tree())
    assert tree_digest(pt.load(url)) == tree_digest(tree())
    with pt.open_checkpoint(url) as leaves:
        assert leaves["step"] == 0


def test_a_directory_there(bucket):
    url = f"{bucket}/b"
    for step in range(4):
        store.add(url, step, tree(step), metadata={}, share=True, retention=store.Retention(2))
    assert places.names(url) == ["LATEST", "blocks", "step_00000002.ckpt", "step_00000003.ckpt"]
    assert store.check(url) == []
    assert tree_digest(pt.load(store.latest(url))) == tree_digest(tree(3))


def test_an_upload_that_breaks_off_leaves_what_was_there(bucket):
    url = f"{bucket}/c/a.ckpt"
    pt.save(url, tree(1))
    with pytest.raises(RuntimeError, match="stop"), places.replacing(url) as file:
        file.write(bytes(12 << 20))
        raise RuntimeError("stop")
    assert pt.load(url)["step"] == 1
    assert places.names(f"{bucket}/c") == ["a.ckpt"]


def test_no_such_bucket_is_a_clear_error(bucket):
    with pytest.raises(CheckpointError, match="s3://none/a.ckpt can't be read"):
        pt.load("s3://none/a.ckpt")
    with pytest.raises(CheckpointError, match="s3://none/a.ckpt can't be written"):
        pt.save("s3://none/a.ckpt", tree())
