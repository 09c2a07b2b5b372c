"""The fused loss in code that nobody edits: patch, unpatch, convert."""

import copy
import functools
import importlib
import io
import pickle
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import is_fused, torch_bce

import fused_bce
from fused_bce import patching

TorchLoss = torch.nn.BCEWithLogitsLoss


def is_patched() -> bool:
    return F.binary_cross_entropy_with_logits is not torch_bce


@pytest.fixture(autouse=True)
def _unpatched():
    assert not is_patched()
    yield
    left = is_patched()
    fused_bce.unpatch()
    F.binary_cross_entropy_with_logits = torch_bce
    assert not left, "the test left the function replaced"


def batch(device):
    return torch.randn(4, 3, device=device, requires_grad=True), torch.rand(4, 3, device=device)


def test_context_manager(device):
    data = batch(device)
    expected = F.binary_cross_entropy_with_logits(*data)
    before = torch.nn.BCEWithLogitsLoss()
    with fused_bce.patch():
        assert is_patched()
        inside = torch.nn.BCEWithLogitsLoss()
        for loss in (inside(*data), before(*data), F.binary_cross_entropy_with_logits(*data)):
            assert is_fused(loss)
            torch.testing.assert_close(loss, expected)
    assert not is_fused(before(*data))
    assert not is_fused(inside(*data))
    assert not is_fused(F.binary_cross_entropy_with_logits(*data))


def test_the_class_stays_torchs():
    # Libraries ask for it by isinstance, of instances made before and after they were imported.
    with fused_bce.patch():
        assert torch.nn.BCEWithLogitsLoss is TorchLoss
        assert isinstance(fused_bce.BCEWithLogitsLoss(), torch.nn.BCEWithLogitsLoss)


def test_call_and_unpatch(device):
    data = batch(device)
    fused_bce.patch()
    assert is_fused(F.binary_cross_entropy_with_logits(*data))
    fused_bce.unpatch()
    assert not is_fused(F.binary_cross_entropy_with_logits(*data))


def test_repeated_calls_need_one_unpatch():
    fused_bce.patch()
    fused_bce.patch()
    fused_bce.unpatch()
    assert not is_patched()
    fused_bce.unpatch()
    assert not is_patched()


def test_nested():
    with fused_bce.patch():
        with fused_bce.patch():
            pass
        assert is_patched()
    assert not is_patched()
    fused_bce.patch()
    with fused_bce.patch():
        pass
    assert is_patched()
    fused_bce.unpatch()


def test_context_may_be_entered_again():
    context = fused_bce.patch()
    for _ in range(2):
        with context:
            assert is_patched()
        assert not is_patched()


class SlowDict(dict):
    """Its answer is old when it comes."""

    def __contains__(self, key):
        found = super().__contains__(key)
        time.sleep(0.005)
        return found


def test_threads_that_patch_at_the_same_time(monkeypatch):
    monkeypatch.setattr(patching, "_replaced", SlowDict())

    def work():
        for _ in range(5):
            with fused_bce.patch():
                pass

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work) for _ in range(8)]
        assert all(future.result() is None for future in futures)
    assert not is_patched()


def test_exception_restores():
    with pytest.raises(KeyError), fused_bce.patch():
        raise KeyError
    assert not is_patched()


def test_what_stood_there_before_comes_back(monkeypatch):
    # Somebody else's replacement, not torch's function.
    theirs = lambda *args, **kwargs: torch_bce(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", theirs)
    with fused_bce.patch():
        assert F.binary_cross_entropy_with_logits is not theirs
    assert F.binary_cross_entropy_with_logits is theirs
    monkeypatch.undo()


def test_calls_that_are_not_fused(device):
    # They go to torch's function, not round in a circle.
    logits, target = (t.detach() for t in batch(device))
    expected = torch.func.vmap(torch_bce)(logits, target)
    with fused_bce.patch():
        got = torch.func.vmap(F.binary_cross_entropy_with_logits)(logits, target)
        with pytest.raises(ValueError, match="must be the same as input size"):
            F.binary_cross_entropy_with_logits(logits, target[0])
    torch.testing.assert_close(got, expected)


class Seeing(torch.Tensor):
    """Notes the functions that it passes through."""

    calls: list

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.calls.append(function)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_overrides_see_torchs_own_function(device):
    logits, target = (t.detach() for t in batch(device))
    Seeing.calls = []
    with fused_bce.patch():
        F.binary_cross_entropy_with_logits(logits.as_subclass(Seeing), target)
    assert Seeing.calls == [torch_bce]


@pytest.mark.parametrize("make", [TorchLoss, fused_bce.BCEWithLogitsLoss], ids=["torch", "fused"])
def test_instances_are_copied_and_pickled(make, device):
    loss = make(pos_weight=torch.rand(3)).to(device)
    data = batch(device)
    with fused_bce.patch():
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert type(twin) is make
            assert is_fused(twin(*data))
            torch.testing.assert_close(twin(*data), loss(*data))
        file = io.BytesIO()
        torch.save(loss, file)
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is make


@pytest.mark.filterwarnings("ignore:`torch.jit.*` is (deprecated|not supported)")
def test_scripted_while_patched(device):
    data = batch(device)
    with fused_bce.patch():
        scripted = torch.jit.script(torch.nn.BCEWithLogitsLoss())
        torch.testing.assert_close(scripted(*data), torch_bce(*data))


def test_compiled_while_patched(device):
    data = batch(device)
    torch.compiler.reset()
    with fused_bce.patch():
        compiled = torch.compile(
            lambda x, t: F.binary_cross_entropy_with_logits(x, t), backend="aot_eager"
        )
        loss = compiled(*data)
    torch.testing.assert_close(loss, torch_bce(*data))
    loss.backward()
    logits = data[0].detach().requires_grad_()
    torch_bce(logits, data[1]).backward()
    torch.testing.assert_close(data[0].grad, logits.grad)


IMPORTED_BEFORE = """
from torch.nn import BCEWithLogitsLoss
from torch.nn.functional import binary_cross_entropy_with_logits
import torch, fused_bce
data = torch.randn(3, requires_grad=True), torch.rand(3)
fused = lambda loss: "BCEWithLogitsFunction" in loss.grad_fn.name()
with fused_bce.patch():
    # What the docstring says of names that were imported before.
    assert not fused(binary_cross_entropy_with_logits(*data))
    assert fused(BCEWithLogitsLoss()(*data))
    from torch.nn.functional import binary_cross_entropy_with_logits as late
assert fused(late(*data))
"""


def test_names_imported_before():
    subprocess.run([sys.executable, "-c", IMPORTED_BEFORE], check=True)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(2, 3)
        self.losses = torch.nn.ModuleDict({"a": TorchLoss(pos_weight=torch.rand(3))})
        self.also = self.losses["a"]
        self.by_hand = TorchLoss(weight=torch.rand(3), reduction="sum")


def test_convert(device):
    model = Model().to(device).double()
    model.by_hand.eval()
    called = []
    model.by_hand.register_forward_hook(lambda *_: called.append(True))
    state, data = copy.deepcopy(model.state_dict()), batch(device)
    kept = {name: id(module) for name, module in model.named_modules()}
    expected = {name: getattr(model, name)(*data) for name in ("also", "by_hand")}

    assert fused_bce.convert(model) is model
    assert {name: id(module) for name, module in model.named_modules()} == kept
    assert model.also is model.losses["a"]
    assert (model.also.training, model.by_hand.training) == (True, False)
    assert model.by_hand.reduction == "sum"
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    called.clear()
    for name, loss in expected.items():
        assert type(getattr(model, name)) is fused_bce.BCEWithLogitsLoss
        assert is_fused(getattr(model, name)(*data))
        torch.testing.assert_close(getattr(model, name)(*data), loss)
    assert called == [True, True]
    assert type(model.head) is torch.nn.Linear


def test_convert_the_model_itself():
    assert type(fused_bce.convert(TorchLoss())) is fused_bce.BCEWithLogitsLoss


def test_convert_leaves_subclasses_alone():
    class Doubled(TorchLoss):
        def forward(self, input, target):
            return 2 * super().forward(input, target)

    model = torch.nn.Sequential(Doubled(), torch.nn.BCELoss(), fused_bce.BCEWithLogitsLoss())
    classes = [type(module) for module in model]
    assert [type(module) for module in fused_bce.convert(model)] == classes


def test_convert_while_patched():
    model = torch.nn.Sequential(TorchLoss())
    with fused_bce.patch():
        assert type(fused_bce.convert(model)[0]) is fused_bce.BCEWithLogitsLoss


@pytest.fixture
def torchvision_names(monkeypatch):
    """The modules in which torchvision has its focal loss, without torchvision."""
    names = ("ops", "ops.focal_loss", "models.detection.retinanet", "models.detection.fcos")
    modules = {f"torchvision.{name}": types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.sigmoid_focal_loss = name
        module.__name__ = name
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def of_focal(modules) -> list:
    return [module.sigmoid_focal_loss for module in modules.values()]


def test_focal(torchvision_names):
    ours = [patching._focal] * 4
    with fused_bce.patch():
        assert of_focal(torchvision_names) == list(torchvision_names)
        # A patch inside another puts back what it replaced itself.
        with fused_bce.patch(focal=True):
            assert of_focal(torchvision_names) == ours
        assert of_focal(torchvision_names) == list(torchvision_names)
        assert is_patched()
    fused_bce.patch(focal=True)
    assert of_focal(torchvision_names) == ours
    fused_bce.unpatch()
    assert of_focal(torchvision_names) == list(torchvision_names)


def test_focal_of_another_torchvision(torchvision_names):
    """Nothing is replaced where one name is missing, for nobody could put it back."""
    del torchvision_names["torchvision.models.detection.fcos"].sigmoid_focal_loss
    with pytest.raises(AttributeError, match="sigmoid_focal_loss"):
        fused_bce.patch(focal=True)
    assert not is_patched()
    assert torchvision_names["torchvision.ops"].sigmoid_focal_loss == "torchvision.ops"


def test_what_another_put_there_stays(monkeypatch):
    """Patching once more replaces nothing that was replaced already."""
    with fused_bce.patch():
        theirs = lambda *operands: None  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "binary_cross_entropy_with_logits", theirs)
        with fused_bce.patch():
            assert torch.nn.functional.binary_cross_entropy_with_logits is theirs
        monkeypatch.undo()
    assert not is_patched()


REPLACED_AGAIN = r"binary_cross_entropy_with_logits was replaced again after fused_bce.patch\(\)"


@pytest.mark.parametrize("name", ["binary_cross_entropy_with_logits", "sigmoid_focal_loss"])
def test_unpatched_inside_of_another_replacement(name, torchvision_names):
    """That of a test, say: what it puts back afterwards is ours, and can be removed."""
    module = F if name in vars(F) else torchvision_names["torchvision.ops"]
    original = getattr(module, name)
    fused_bce.patch(focal=module is not F)
    with mock.patch.object(module, name) as theirs:
        with pytest.warns(UserWarning, match=f"{name} was replaced again") as warned:
            fused_bce.unpatch()
        assert [warning.filename for warning in warned] == [__file__]
        assert getattr(module, name) is theirs
        fused_bce.unpatch()  # It has said so.
    assert getattr(module, name) is not original
    fused_bce.unpatch()
    assert getattr(module, name) is original
    assert not is_patched()


def test_patched_again_where_ours_came_to_light():
    with mock.patch.object(F, "binary_cross_entropy_with_logits"):
        fused_bce.patch()
        fused_bce.unpatch()
    fused_bce.patch()
    theirs = mock.patch.object(F, "binary_cross_entropy_with_logits")
    with theirs, pytest.warns(UserWarning, match=REPLACED_AGAIN):
        fused_bce.unpatch()
    with fused_bce.patch():
        assert is_patched()
    assert not is_patched()


@pytest.mark.parametrize("leave", ["unpatch", "exit"])
def test_a_wrapper_put_on_top_stays(leave, monkeypatch, device):
    data = batch(device)
    context = fused_bce.patch()
    if leave == "exit":
        context.__enter__()
    ours, calls = F.binary_cross_entropy_with_logits, []

    @functools.wraps(ours)
    def wrapper(*args):
        calls.append(args)
        return ours(*args)

    monkeypatch.setattr(F, "binary_cross_entropy_with_logits", wrapper)
    with pytest.warns(UserWarning, match=REPLACED_AGAIN):
        fused_bce.unpatch() if leave == "unpatch" else context.__exit__(None, None, None)
    torch.testing.assert_close(F.binary_cross_entropy_with_logits(*data), torch_bce(*data))
    assert len(calls) == 1
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(torch_bce, protocol)) is torch_bce
    monkeypatch.undo()
    fused_bce.unpatch()
    assert not is_patched()


def test_a_replacement_that_ended_meanwhile():
    """Nothing of it is put back, and nothing of ours is left."""
    with mock.patch.object(F, "binary_cross_entropy_with_logits"):
        fused_bce.patch()
    assert not is_patched()
    with pytest.warns(UserWarning, match=REPLACED_AGAIN):
        fused_bce.unpatch()
    assert not is_patched()
    with fused_bce.patch():
        assert is_patched()
    assert not is_patched()


@pytest.mark.parametrize("clear", [False, True], ids=["importlib", "autoreload"])
@pytest.mark.parametrize("leave", ["unpatch", "exit"])
def test_reloaded_while_patched(leave, clear):
    """By importlib, or as IPython's autoreload does it."""
    with fused_bce.patch():
        assert is_patched()
        if clear:
            kept = {n: vars(patching)[n] for n in ("__name__", "__loader__", "__spec__")}
            vars(patching).clear()
            vars(patching).update(kept)
        importlib.reload(patching)
        with patching.patch():
            pass
        assert is_patched()
        if leave == "unpatch":
            fused_bce.unpatch()
            assert not is_patched()
    assert not is_patched()


def pickled(function) -> list[bytes]:
    """By every protocol, in C and in Python, and as others do it."""
    file = io.BytesIO()
    torch.save([function], file)
    file.seek(0)
    assert torch.load(file, weights_only=False) == [function]
    assert copy.deepcopy(functools.partial(function)).func is function
    # What the arguments of a spawned process go through
    made = [bytes(ForkingPickler.dumps(function))]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        made += [pickle.dumps(function, protocol), pickle._dumps(function, protocol)]
    assert all(pickle.loads(data) is function for data in made)
    return made


LOADED = """
import importlib, pickle, sys, torch
sys.modules["fused_bce"] = None
original = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
pickles = pickle.load(sys.stdin.buffer)
assert pickles and all(pickle.loads(data) is original for data in pickles)
"""


def check_loaded_elsewhere(pickles, *place, cwd=None):
    command = [sys.executable, "-c", LOADED, *place]
    subprocess.run(command, input=pickle.dumps(pickles), check=True, cwd=cwd)


def test_functions_are_pickled_by_torchs_name():
    """Torch's, held from before, and what was picked up in its place: patched and after that. A
    process without this package gets torch's function."""
    explicit = fused_bce.functional.binary_cross_entropy_with_logits
    pickles = []
    for _ in range(2):
        with fused_bce.patch():
            picked_up = F.binary_cross_entropy_with_logits
            for function in (torch_bce, picked_up):
                pickles += pickled(function)
            assert b"fused_bce" in pickle.dumps(explicit)
            assert pickle.loads(pickle.dumps(explicit)) is explicit
        pickles += pickled(picked_up)
        assert pickle.dumps(torch_bce) == PICKLED
    check_loaded_elsewhere(pickles, "torch.nn.functional", "binary_cross_entropy_with_logits")


PICKLED = pickle.dumps(torch_bce)


def test_functions_are_pickled_by_torchvisions_name(torchvision_names, tmp_path, monkeypatch):
    source = "def sigmoid_focal_loss():\n    pass\n"
    focal_loss = torchvision_names["torchvision.ops.focal_loss"]
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    exec(source, vars(focal_loss))
    held = focal_loss.sigmoid_focal_loss
    for module in torchvision_names.values():
        module.sigmoid_focal_loss = held
    pickles = []
    with fused_bce.patch(focal=True):
        picked_up = [module.sigmoid_focal_loss for module in torchvision_names.values()]
        assert picked_up == [picked_up[0]] * 4 != [held] * 4
        for function in (held, picked_up[0]):
            pickles += pickled(function)
    pickles += pickled(picked_up[0])
    # A torchvision for the other process
    package = tmp_path / "torchvision" / "ops"
    package.mkdir(parents=True)
    (package / "focal_loss.py").write_text(source)
    place = "torchvision.ops.focal_loss", "sigmoid_focal_loss"
    check_loaded_elsewhere(pickles, *place, cwd=tmp_path)


def test_cloudpickle_goes_by_the_name():
    cloudpickle = pytest.importorskip("cloudpickle")
    with fused_bce.patch():
        for function in (torch_bce, F.binary_cross_entropy_with_logits):
            assert cloudpickle.loads(cloudpickle.dumps(function)) is function


def test_one_patch_entered_twice():
    patched = fused_bce.patch()
    with patched:
        with patched:
            assert is_patched()
        assert is_patched()
    assert not is_patched()


def test_focal_without_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.ops", raising=False)
    with pytest.raises(ImportError, match="torchvision"):
        fused_bce.patch(focal=True)
    assert not is_patched()
