"""Every bad input is one clear line, of a documented type that also is the builtin one a user would expect."""

import numpy as np
import pytest
import torch
from torch import nn, optim

import laconic
from laconic import errors
from laconic.data.sets import load_dataset
from laconic.recipe import load_recipe

from .models import mlp, snapshot

X = torch.zeros(2, 6, dtype=torch.float64)


def compressor(structures=None, model=None, optimizer=None, **options) -> laconic.Compressor:
    model = mlp() if model is None else model
    optimizer = optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    return laconic.Compressor(model, optimizer, structures, **options)


def by_strength(strength=0.1, **options) -> laconic.LowRank:
    return laconic.LowRank(strength=strength, **options)


def budgeted(*structures, budget=None, **options):
    return compressor(list(structures) or None, budget=budget or laconic.Budget(params=0.5), **{"total_steps": 10, **options})


def with_nan_weight() -> nn.Module:
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    return model


def step_with(value: float, where: str) -> None:
    """One step whose gradient, or whose weight after the step, is not finite."""
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    laconic.Compressor(model, optimizer, by_strength(), every=1)
    model[2].weight.grad = torch.zeros_like(model[2].weight)
    (model[2].weight.grad if where == "gradient" else model[2].weight.data)[0, 0] = value
    optimizer.step()


def compact_with_nan() -> None:
    made = compressor(by_strength(0.0))
    with torch.no_grad():
        made.model[2].weight[0, 0] = float("nan")
    made.compact(energy=0.9)


def energy_beside_a_budget() -> None:
    budgeted().compact(energy=0.9)


def other_optimizer() -> optim.Optimizer:
    return optim.SGD(mlp().parameters(), lr=0.1)


def with_rates_under(name: str) -> optim.Optimizer:
    made = other_optimizer()
    for group in made.param_groups:
        group[name] = group.pop("lr")
    return made


def conv_only() -> nn.Module:
    return nn.Sequential(nn.Embedding(4, 4), nn.LSTM(4, 4))


def compress(**options):
    return laconic.compress(options.pop("model", None) or mlp(), **options)


def with_running_var_inf() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    model[1].running_var[2] = float("inf")
    return model


def changed_after_settling(change):
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, laconic.LowRank(), budget=laconic.Budget(params=0.5), total_steps=10)
    for _ in range(10):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    change(model)
    compressor.compact()


def spoil(model: nn.Module) -> None:
    with torch.no_grad():
        model[4].bias[0] = float("nan")


def twice():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        laconic.Compressor(model, optimizer, by_strength())


V, T = ValueError, TypeError
# what is done, type, builtin type, the message
BAD = {
    # weights and gradients
    "NaN weights before training": (lambda: compressor(by_strength(), with_nan_weight()), errors.NonFiniteError, V, r"2\.weight holds NaN or Inf before training"),
    "NaN weights, post hoc": (lambda: compress(model=with_nan_weight(), energy=0.9), errors.NonFiniteError, V, r"2\.weight.*NaN or Inf"),
    "NaN gradient": (lambda: step_with(float("nan"), "gradient"), errors.NonFiniteError, V, r"2\.weight.*NaN.*its gradient holds them too; optimizer step 1"),
    "Inf gradient": (lambda: step_with(float("inf"), "gradient"), errors.NonFiniteError, V, r"2\.weight.*its gradient holds them too"),
    "NaN weight in training": (lambda: step_with(float("nan"), "weight"), errors.NonFiniteError, V, r"2\.weight.*its last gradient was finite"),
    "NaN weight when compacting": (compact_with_nan, errors.NonFiniteError, V, r"2\.weight holds NaN or Inf: load the last good"),
    "NaN in settled training": (lambda: changed_after_settling(spoil), errors.NonFiniteError, V, r"4\.bias holds NaN or Inf: load the last good"),
    "NaN in the example inputs": (lambda: compressor(by_strength(), example_inputs=(X * float("nan"),)), errors.NonFiniteError, V, r"example_inputs\[0\] holds NaN"),
    "Inf in a running statistic": (lambda: compressor(by_strength(), with_running_var_inf(), example_inputs=(X,)), errors.NonFiniteError, V, r"1\.running_var holds NaN or Inf"),
    "NaN matrix": (lambda: laconic.svt(torch.full((2, 2), float("nan")), 0.1), errors.NonFiniteError, V, "NaN or Inf"),
    "example inputs on the meta device": (lambda: compressor(by_strength(), example_inputs=(X.to("meta"),)), errors.InvalidValueError, V, r"example_inputs\[0\] is on the meta device"),
    "profile on inputs of another shape": (lambda: laconic.profile(mlp(), (X[:, :3],)), errors.InvalidValueError, V, r"example_inputs: Sequential does not run on \(\(\d+, 3\)"),
    "profile of no model": (lambda: laconic.profile(None, (X,)), errors.InvalidTypeError, T, r"model: expected a torch\.nn\.Module, got NoneType"),
    "profile for seconds in words": (lambda: laconic.profile(mlp(), (X,), seconds="1"), errors.InvalidTypeError, T, "seconds = '1': expected a number"),
    "profile for ever": (lambda: laconic.profile(mlp(), (X,), seconds=float("inf")), errors.InvalidValueError, V, "seconds = inf: must be finite and above 0"),
    "calibration that is a number": (lambda: compressor(by_strength()).compact(calibration=3), errors.InvalidTypeError, T, "calibration: expected an iterable of batches.*got int"),
    "calibration that is one batch": (lambda: compress(energy=0.9, calibration=X), errors.InvalidTypeError, T, "calibration: expected an iterable of batches.*got Tensor"),
    "a batch of calibration by another name": (
        lambda: compress(model=nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16)), energy=0.9, calibration=[{"x": X}]),
        errors.InvalidTypeError, T, r"a batch of calibration: x: not among the arguments that Sequential\.forward takes in order: input",
    ),
    "calibration that is one batch by name": (lambda: compress(energy=0.9, calibration={"input": X}), errors.InvalidTypeError, T, "calibration: expected an iterable of batches.*got dict"),
    "saved below a file": (lambda: laconic.save(mlp(), f"{__file__}/model"), errors.CheckpointError, V, r"model cannot be written: .*test_errors\.py is not a directory"),
    # budgets
    "budget 0": (lambda: laconic.Budget(params=0), errors.InvalidValueError, V, r"params=0\): a fraction .* above 0 and at most 1; absolute: max_params="),
    "even neurons beside ranks": (lambda: laconic.compress(mlp(), [laconic.LowRank(), laconic.Channels(even=True)], laconic.Budget(params=0.5), example_inputs=(X,)), errors.InvalidValueError, V, r"Channels\(even=True\): the same part of all neurons stays.*leave out LowRank"),
    "budget of less than one parameter": (lambda: laconic.compress(mlp(), laconic.Channels(), laconic.Budget(params=1e-9), example_inputs=(X,)), errors.InfeasibleBudgetError, V, "smallest feasible"),
    "budget above 1": (lambda: laconic.Budget(macs=1.5), errors.InvalidValueError, V, r"macs=1\.5\)"),
    "budget NaN": (lambda: laconic.Budget(params=float("nan")), errors.InvalidValueError, V, "params=nan"),
    "budget absolute 0": (lambda: laconic.Budget(max_params=0), errors.InvalidValueError, V, r"max_params=0\)"),
    "budget absolute Inf": (lambda: laconic.Budget(max_macs=float("inf")), errors.InvalidValueError, V, "max_macs=inf"),
    "budget empty": (lambda: laconic.Budget(), errors.InvalidValueError, V, "at least one of params="),
    "budget twice": (lambda: laconic.Budget(params=0.5, max_params=10), errors.InvalidValueError, V, "given twice"),
    "budget out of reach": (lambda: budgeted(budget=laconic.Budget(params=0.01)), errors.InfeasibleBudgetError, V, r"out of reach: .*smallest feasible: params=0\.\d+"),
    "budget out of reach, post hoc": (lambda: compress(budget=laconic.Budget(max_params=5)), errors.InfeasibleBudgetError, V, r"at most 5 params .* smallest feasible"),
    "budget in MACs without inputs": (lambda: budgeted(budget=laconic.Budget(macs=0.5)), errors.InvalidValueError, V, "example_inputs"),
    "budget without total_steps": (lambda: budgeted(total_steps=None), errors.InvalidValueError, V, "needs total_steps="),
    "budget in words": (lambda: laconic.Budget(params="0.25"), errors.InvalidTypeError, T, r"Budget: params = '0\.25': expected a number"),
    "budget of another type, post hoc": (lambda: compress(budget=0.5), errors.InvalidTypeError, T, r"0\.5: expected budget=laconic\.Budget"),
    "budget in the place of structures": (lambda: laconic.compress(mlp(), laconic.Budget(params=0.5)), errors.InvalidTypeError, T, "by name"),
    "budget that an embedding breaks": (lambda: compress(model=nn.Sequential(nn.Embedding(500, 8), nn.Linear(8, 64), nn.Linear(64, 8)), budget=laconic.Budget(params=0.3)), errors.InfeasibleBudgetError, V, r"no budget reaches 0\.weight, 4,000 parameters: Embedding"),
    "budget that attention breaks": (lambda: compress(model=nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False), budget=laconic.Budget(params=0.1)), errors.InfeasibleBudgetError, V, r"no budget reaches layers\.0\.self_attn\.in_proj_weight and 1 more, 384 parameters: [^;]*laconic\.unfuse[^;]*; layers\.0\.self_attn\.out_proj\.weight and 1 more, 128 "),
    "budget of another type": (lambda: compressor(budget=0.25, total_steps=10), errors.InvalidTypeError, T, r"budget = 0\.25: expected laconic\.Budget"),
    "energy beside a budget": (energy_beside_a_budget, errors.InvalidValueError, V, "the budget rules here"),
    "energy above 1": (lambda: compress(energy=1.5), errors.InvalidValueError, V, r"1\.5"),
    "energy 0": (lambda: compressor(by_strength()).compact(energy=0), errors.InvalidValueError, V, "0"),
    "energy in words": (lambda: compressor(by_strength()).compact(energy="0.9"), errors.InvalidTypeError, T, r"energy share = '0\.9': expected a number"),
    "energy in words, post hoc": (lambda: compress(energy="0.9"), errors.InvalidTypeError, T, r"energy share = '0\.9': expected a number"),
    "published strength in words": (lambda: laconic.Compressor.as_published(m := mlp(), optim.SGD(m.parameters(), lr=0.1), "a", 10), errors.InvalidTypeError, T, "strength = 'a': expected a number"),
    "published energy 0": (lambda: laconic.Compressor.as_published(m := mlp(), optim.SGD(m.parameters(), lr=0.1), 0.1, 10, energy=0), errors.InvalidValueError, V, "0"),
    "neither energy nor budget, post hoc": (compress, errors.InvalidValueError, V, "exactly one of budget="),
    "both, post hoc": (lambda: compress(energy=0.9, budget=laconic.Budget(params=0.5)), errors.InvalidValueError, V, "exactly one of budget="),
    "energy for neurons, post hoc": (lambda: compress(structures=laconic.Channels(), energy=0.9, example_inputs=(X,)), errors.InvalidValueError, V, "Channels and energy=0.9: neurons are chosen by a budget"),
    # strength and the other options of a structure
    "strength below 0": (lambda: by_strength(-1.0), errors.InvalidValueError, V, r"strength = -1\.0: must be finite and at least 0"),
    "strength NaN": (lambda: by_strength(float("nan")), errors.InvalidValueError, V, "strength = nan"),
    "strength Inf": (lambda: by_strength(float("inf")), errors.InvalidValueError, V, "strength = inf"),
    "neither budget nor strength": (compressor, errors.InvalidValueError, V, r"needs a budget=.*or structures=\[laconic\.LowRank\(strength="),
    "scale a list": (lambda: laconic.LowRank(scale=["relative"]), errors.InvalidValueError, V, r"scale = \['relative'\] is unknown"),
    "scale unknown": (lambda: laconic.LowRank(scale="relativ"), errors.InvalidValueError, V, r"scale = 'relativ' is unknown; did you mean 'relative'"),
    "matricization unknown": (lambda: laconic.LowRank(matricization="out,in"), errors.InvalidValueError, V, "matricization = 'out,in' is unknown"),
    "penalty of another type": (lambda: laconic.LowRank(penalty="L1"), errors.InvalidTypeError, T, r"penalty = 'L1': expected .* such as laconic\.LogSum"),
    "multiple a truth value": (lambda: laconic.LowRank(multiple=True), errors.InvalidValueError, V, "multiple = True"),
    "multiple no number": (lambda: laconic.Channels(multiple="8"), errors.InvalidValueError, V, "multiple = '8'"),
    "multiple 0": (lambda: laconic.LowRank(multiple=0), errors.InvalidValueError, V, "multiple = 0"),
    "epsilon 0": (lambda: laconic.LogSum(epsilon=0), errors.InvalidValueError, V, "epsilon=0"),
    "structures of another type": (lambda: compressor([laconic.L1()]), errors.InvalidTypeError, T, r"expected laconic\.LowRank"),
    "structures empty": (lambda: compressor([]), errors.InvalidValueError, V, "structures is empty"),
    "structures that overlap": (lambda: compressor([by_strength(), by_strength()]), errors.InvalidValueError, V, r"0\.weight is claimed by 2"),
    "include matches nothing": (lambda: compressor(by_strength(include="conv*")), errors.PatternError, V, r"include='conv\*' matches no module or parameter; there are: 0"),
    "exclude matches nothing": (lambda: compressor(by_strength(exclude=("0", "9"))), errors.PatternError, V, "exclude='9' matches no"),
    "include an empty list": (lambda: laconic.LowRank(include=[]), errors.InvalidValueError, V, r"include = \[\]: an empty list selects nothing"),
    "include a number": (lambda: laconic.LowRank(include=3), errors.InvalidTypeError, T, "include = 3: expected a pattern"),
    "include and exclude leave nothing of one structure": (lambda: compressor([by_strength(), laconic.Channels(strength=0.1, include="0", exclude="0")], example_inputs=(X,)), errors.PatternError, V, r"Channels\(include=\('0',\), exclude=\('0',\)\): nothing that Channels could act on"),
    "neurons of the output": (lambda: compressor([by_strength(), laconic.Channels(strength=0.1, include="4")], example_inputs=(X,)), errors.PatternError, V, "nothing that Channels could act on"),
    # the run
    "every 0": (lambda: compressor(by_strength(), every=0), errors.InvalidValueError, V, "every = 0: must be a whole number, at least 1"),
    "every a fraction": (lambda: compressor(by_strength(), every=2.5), errors.InvalidValueError, V, r"every = 2\.5"),
    "every a truth value": (lambda: compressor(by_strength(), every=True), errors.InvalidValueError, V, "every = True"),
    "total_steps a fraction of numpy's": (lambda: budgeted(total_steps=np.float64(10)), errors.InvalidValueError, V, "total_steps = .*10"),
    "total_steps a truth value of numpy's": (lambda: budgeted(total_steps=np.bool_(True)), errors.InvalidValueError, V, "total_steps = .*True"),
    "total_steps 0": (lambda: budgeted(total_steps=0), errors.InvalidValueError, V, "total_steps = 0"),
    "cut unknown": (lambda: budgeted(cut="erly"), errors.InvalidValueError, V, "cut = 'erly' is unknown; did you mean 'early'"),
    "schedule backwards": (lambda: laconic.Schedule(warmup=0.6, settle=0.5), errors.InvalidValueError, V, "need 0 <= warmup < settle <= 1"),
    "schedule of None": (lambda: laconic.Schedule(warmup=None), errors.InvalidTypeError, T, "Schedule: warmup = None: expected a number"),
    "schedule a number": (lambda: budgeted(schedule=0.5), errors.InvalidTypeError, T, r"schedule = 0\.5: expected laconic\.Schedule"),
    "schedule without a budget": (lambda: compressor(by_strength(), schedule=laconic.Schedule()), errors.InvalidValueError, V, "no effect without a budget"),
    "example_inputs a dict of other names": (lambda: compressor(by_strength(), example_inputs={"x": X}), errors.InvalidTypeError, T, r"example_inputs: x: not among .* Sequential\.forward takes in order: input"),
    "example_inputs a set": (lambda: compressor(by_strength(), example_inputs={X}), errors.InvalidTypeError, T, "must be a tuple .* got set"),
    "example_inputs of another shape": (lambda: compressor(by_strength(), example_inputs=(X[:, :3],)), errors.InvalidValueError, V, r"example_inputs: Sequential does not run on \(\(2, 3\) torch\.float64\): RuntimeError: "),
    "two compressors at once": (twice, errors.OptimizerError, V, r"another Compressor is on this model and optimizer already: detach\(\)"),
    "a layer replaced after settling": (lambda: changed_after_settling(lambda m: m.append(nn.Linear(4, 4))), errors.OptimizerError, V, r"parameters changed in mid-run \(added: 5\.bias"),
    "only_faster without inputs": (lambda: compress(energy=0.5, only_faster=True), errors.InvalidValueError, V, "only_faster=True needs example_inputs"),
    "step() of a hooked optimizer": (lambda: compressor(by_strength()).step(), errors.LaconicError, Exception, r"optimizer\.step\(\) is enough"),
    "compacted into a number": (lambda: compressor(by_strength()).compact(into=3), errors.InvalidTypeError, T, r"into: expected a torch\.nn\.Module, got int"),
    # models and optimizers
    "not a model": (lambda: compressor(by_strength(), model=lambda x: x, optimizer=other_optimizer()), errors.InvalidTypeError, T, r"expected a torch\.nn\.Module, got function"),
    "the class of a model, post hoc": (lambda: laconic.compress(nn.Linear, energy=0.9), errors.InvalidTypeError, T, "got the class Linear itself"),
    "no model, post hoc": (lambda: laconic.compress(None, energy=0.9), errors.InvalidTypeError, T, r"expected a torch\.nn\.Module, got NoneType"),
    "nothing to compress": (lambda: compressor(by_strength(), conv_only()), errors.NothingToCompressError, V, r"nothing to compress in Sequential \(0\.weight: Embedding is cut by"),
    "no weights at all": (lambda: compress(model=nn.Sequential(nn.ReLU()), energy=0.5), errors.NothingToCompressError, V, "no weight of two or more dimensions"),
    "the model is the layer": (lambda: compress(model=nn.Linear(8, 8), energy=0.5), errors.NothingToCompressError, V, r"wrap it in nn\.Sequential"),
    "lazy layer, with inputs": (lambda: compress(model=nn.Sequential(nn.LazyLinear(4)), energy=0.5, example_inputs=(X,)), errors.InvalidValueError, V, r"0\.weight is not initialised yet"),
    "lazy layer": (lambda: compress(model=nn.Sequential(nn.LazyLinear(4)), energy=0.5), errors.InvalidValueError, V, r"0\.weight is not initialised yet"),
    "optimizer of another model": (lambda: compressor(by_strength(), optimizer=other_optimizer()), errors.OptimizerError, V, r"does not own any of the model's weights: build it from model\.parameters\(\)"),
    "optimizer list empty": (lambda: compressor(by_strength(), optimizer=[]), errors.OptimizerError, V, "list is empty"),
    "the same optimizer twice": (lambda: compressor(by_strength(), m := mlp(), [o := optim.SGD(m.parameters(), lr=0.1), o]), errors.OptimizerError, V, "optimizer: the same SGD twice in the list"),
    "LBFGS": (lambda: compressor(by_strength(), m := mlp(), optim.LBFGS(m.parameters())), errors.UnsupportedOptimizerError, T, "LBFGS evaluates the loss several times per step"),
    "optimizer without lr": (lambda: compressor(by_strength(), optimizer=with_rates_under("eta")), errors.UnsupportedOptimizerError, T, r"SGD has no 'lr' in its param_groups, but .*: keep it there under that name"),
    "optimizer without groups": (lambda: compressor(by_strength(), optimizer=object()), errors.UnsupportedOptimizerError, T, "object has no param_groups"),
    # files, recipes, data
    "load: missing": (lambda: laconic.load("/nowhere/at/all", mlp()), errors.CheckpointNotFoundError, FileNotFoundError, "does not exist"),
    "load: a class": (lambda: laconic.load("/nowhere/at/all", nn.Linear), errors.InvalidTypeError, T, r"got the class Linear itself: build one first, Linear\(\.\.\.\)"),
    "load: no model": (lambda: laconic.load("/nowhere/at/all", None), errors.InvalidTypeError, T, r"expected a torch\.nn\.Module, got NoneType"),
    "run below a file": (lambda: laconic.RunCheckpoints(__file__, mlp()), errors.CheckpointError, V, r"cannot be written: .*test_errors\.py is not a directory"),
    "save: a class": (lambda: laconic.save(nn.Linear, "/nowhere/at/all"), errors.InvalidTypeError, T, "got the class Linear itself"),
    "state None": (lambda: compressor(by_strength()).load_state_dict(None), errors.InvalidTypeError, T, r"expected the dict that Compressor\.state_dict\(\) returned, got NoneType"),
    "state of another version": (lambda: compressor(by_strength()).load_state_dict({"version": 0}), errors.CheckpointError, V, "format version 0; this laconic reads 10"),
    "recipe unknown": (lambda: load_recipe("digit"), errors.RecipeError, V, "neither a file nor a shipped recipe; did you mean 'digits'"),
    "data missing": (lambda: load_dataset("scene", "/nowhere/at/all"), errors.DataNotFoundError, FileNotFoundError, "/nowhere/at/all"),
    "data unknown": (lambda: load_dataset("scen"), errors.InvalidValueError, V, "did you mean 'scene'"),
    "solver unknown": (lambda: laconic.svt(torch.eye(2), 0.1, solver="gramm"), errors.InvalidValueError, V, "did you mean 'gram'"),
    "tau below 0": (lambda: laconic.svt(torch.eye(2), -1.0), errors.InvalidValueError, V, "tau"),
    "matrix of integers": (lambda: laconic.svt(torch.eye(2).int(), 0.1), errors.InvalidTypeError, T, "float"),
    "array in place of a tensor": (lambda: laconic.svt(np.eye(2), 0.1), errors.InvalidTypeError, T, "ndarray"),
}  # fmt: skip


@pytest.mark.parametrize(("do", "kind", "builtin", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_clear_line_of_the_documented_type(do, kind, builtin, message):
    with pytest.raises(kind, match=message) as caught:
        do()
    assert type(caught.value) is kind
    assert isinstance(caught.value, laconic.LaconicError)
    assert isinstance(caught.value, builtin)
    assert "\n" not in str(caught.value)


def test_whole_numbers_of_numpy_are_whole_numbers():
    made = budgeted(total_steps=np.int64(60), every=np.int32(2))
    assert (made.total_steps, type(made.total_steps), made.every, type(made.every)) == (60, int, 2, int)


def test_an_unknown_recipe_key_is_answered_with_the_nearest_valid_one(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('task = "digits"\nepoch = 3\n')
    with pytest.raises(laconic.RecipeError, match=r"mine\.toml: unknown key 'epoch'; did you mean 'epochs'"):
        load_recipe(path)


@pytest.mark.parametrize(
    "build",
    [
        lambda *of: laconic.Compressor(*of, budget=laconic.Budget(params=0.01), total_steps=10),
        lambda *of: laconic.Compressor.as_published(*of, strength=0.1, steps_per_epoch=10, energy=90),
    ],
)
def test_a_refused_construction_leaves_no_hook_and_changes_nothing(build):
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=r"out of reach|energy share = 90"):
        build(model, optimizer)
    assert not optimizer._optimizer_step_post_hooks
    assert [str(x) for x in snapshot(model, optimizer)] == [str(x) for x in before]


def test_a_not_a_number_in_training_spoils_no_other_weight():
    model = mlp()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    compressor = laconic.Compressor(model, optimizer, by_strength(), every=1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(laconic.NonFiniteError):
        optimizer.step()
    assert bool(model[0].weight.isfinite().all())
    assert bool(model[4].weight.isfinite().all())
    with pytest.raises(laconic.NonFiniteError, match=r"2\.weight"):  # and it is not forgotten
        compressor.compact(energy=0.9)


def test_every_error_is_a_laconic_error_and_is_exported():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, BaseException)]
    assert len(kinds) > 10
    for kind in kinds:
        assert issubclass(kind, laconic.LaconicError)
        assert getattr(laconic, kind.__name__) is kind
        assert kind.__doc__


def test_the_error_table_covers_every_type_that_the_training_side_raises():
    elsewhere = {"DecompositionError", "SurgeryError", "ArchitectureMismatchError", "MissingExtraError"}
    tested = {row[1].__name__ for row in BAD.values()}
    kinds = {e.__name__ for e in vars(errors).values() if isinstance(e, type) and issubclass(e, BaseException)}
    assert tested == kinds - elsewhere
