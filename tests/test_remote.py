"""Checkpoints at URLs: in memory, and on a real FTP server on this machine."""

import os
import threading
import uuid

import fsspec
import pytest
import torch
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

import puretrain as pt
from puretrain.checkpoint import places, store
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import tree_digest


@pytest.fixture(scope="module")
def ftp(tmp_path_factory):
    root = tmp_path_factory.mktemp("ftp")
    authorizer = DummyAuthorizer()
    authorizer.add_user("me", "secret", str(root), perm="elradfmwMT")

    class Handler(FTPHandler):
        pass

    Handler.authorizer = authorizer
    server = FTPServer(("127.0.0.1", 0), Handler)
    port = server.socket.getsockname()[1]
    ending = threading.Event()

    def serve():
        while not ending.is_set():
            server.serve_forever(timeout=0.05, blocking=False)
        server.close_all()

    thread = threading.Thread(target=serve)
    thread.start()
    yield f"ftp://me:secret@127.0.0.1:{port}", root
    ending.set()
    thread.join()


@pytest.fixture(params=["memory", "ftp", "file"])
def place(request, ftp, tmp_path):
    name = uuid.uuid4().hex
    if request.param == "memory":
        return f"memory://{name}"
    return f"{ftp[0]}/{name}" if request.param == "ftp" else f"file://{tmp_path}"


def tree(step=0):
    return {
        "w": torch.arange(100_000, dtype=torch.float32),
        "changing": torch.full((30_000,), float(step)),
        "text": "ä",
        "step": step,
    }


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_save_and_load(place, compression):
    url = f"{place}/runs/a.ckpt"
    pt.save(url, tree(), metadata={"note": 1}, compression=compression)
    assert tree_digest(pt.load(url)) == tree_digest(tree())
    pt.verify(url)
    assert pt.read_index(url).metadata["note"] == 1
    assert torch.equal(pt.load(url, only="changing")["changing"], tree()["changing"])
    with pt.open_checkpoint(url) as leaves:
        assert leaves["text"] == "ä"
    pt.save(url, tree(1))  # it is replaced
    assert pt.load(url)["step"] == 1
    assert places.names(f"{place}/runs") == ["a.ckpt"]


def test_a_file_is_the_same_here_and_there(place, tmp_path):
    pt.save(f"{place}/a.ckpt", tree())
    with fsspec.open(f"{place}/a.ckpt", "rb") as file:
        content = file.read()
    (tmp_path / "b.ckpt").write_bytes(content)
    assert tree_digest(pt.load(tmp_path / "b.ckpt", mmap=True)) == tree_digest(tree())


def test_a_directory_there(place):
    url = f"{place}/runs/b"
    for step in range(4):
        store.add(url, step, tree(step), metadata={}, share=True, retention=store.Retention(2))
    assert places.names(url) == ["LATEST", "blocks", "step_00000002.ckpt", "step_00000003.ckpt"]
    assert len(places.names(f"{url}/blocks")) == 1
    assert tree_digest(pt.load(store.latest(url))) == tree_digest(tree(3))
    assert store.check(url) == []
    assert [entry.step for entry in store.begin(url, 2)] == [3]
    assert str(pt.latest(url)).endswith("step_00000002.ckpt")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_saves_there_and_is_resumed_from_there(place, asynchronous):
    def run(steps, directory):
        optimizer = pt.optim.adamw(0.1)
        options = {"every": 2, "keep": 2, "share": True, "asynchronous": asynchronous}
        return pt.Run(
            state=pt.TrainState.create(
                {"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0)
            ),
            step=pt.train_step(lambda p, b, x, key: ((p["w"] - x) ** 2).sum(), optimizer),
            batches=pt.batches(torch.arange(36.0).reshape(12, 3), 2, shuffle=True, seed=0),
            steps=steps,
            observers=[pt.checkpoints(directory, **options)] if directory else [],
            directory=directory,
        )

    whole = run(9, None).fit()
    run(5, f"{place}/run").fit()
    with pytest.raises(ConfigurationError, match="step_00000005.ckpt"):
        run(9, f"{place}/run").fit()
    assert tree_digest(run(9, f"{place}/run").fit(resume=True)) == tree_digest(whole)
    assert tree_digest(run(9, None).fit(resume=f"{place}/run")) == tree_digest(whole)


def test_an_upload_that_breaks_off_leaves_what_was_there(ftp, monkeypatch):
    from fsspec.implementations.ftp import FTPFile

    url = f"{ftp[0]}/{uuid.uuid4().hex}/a.ckpt"
    pt.save(url, tree(1))
    original = FTPFile._upload_chunk

    def fail(self, final=False):
        original(self, final)
        raise ConnectionResetError("the connection is gone")

    with monkeypatch.context() as patch:
        patch.setattr(FTPFile, "_upload_chunk", fail)
        with pytest.raises(CheckpointError, match="can't be written: the connection is gone"):
            pt.save(url, tree(2))
    assert tree_digest(pt.load(url)) == tree_digest(tree(1))


def test_a_cut_upload_is_noticed(ftp, monkeypatch):
    from fsspec.implementations.ftp import FTPFileSystem

    url = f"{ftp[0]}/{uuid.uuid4().hex}/a.ckpt"
    monkeypatch.setattr(FTPFileSystem, "size", lambda self, path: 100)
    with pytest.raises(CheckpointError, match="100 of .* bytes have arrived"):
        pt.save(url, tree())


def test_a_damaged_file_there_is_found_out(ftp):
    name = uuid.uuid4().hex
    url = f"{ftp[0]}/{name}/a.ckpt"
    pt.save(url, tree())
    path = ftp[1] / name / "a.ckpt"
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        pt.load(url)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="damaged"):
        pt.load(url)


def test_what_is_not_there_is_a_clear_error(place):
    with pytest.raises(CheckpointError, match="can't be read"):
        pt.load(f"{place}/none.ckpt")
    assert pt.latest(f"{place}/none") is None


def test_nobody_at_the_other_end():
    with pytest.raises(CheckpointError, match="can't be read: .*refused"):
        pt.load("ftp://127.0.0.1:9/a.ckpt")
    with pytest.raises(ConfigurationError, match="nonsense"):
        pt.load("nonsense://a/b.ckpt")
    with pytest.raises(ConfigurationError, match="can't be mapped"):
        pt.load("memory://a/b.ckpt", mmap=True)


def test_a_file_url_is_a_path(tmp_path):
    pt.save(f"file://{tmp_path}/a.ckpt", tree())
    assert os.listdir(tmp_path) == ["a.ckpt"]
    assert tree_digest(pt.load(f"file://{tmp_path}/a.ckpt", mmap=True)) == tree_digest(tree())
