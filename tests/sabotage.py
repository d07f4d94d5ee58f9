"""Break the code on purpose, one small wrong edit at a time, and require red.

    python tests/sabotage.py [WORDS OF A NAME ...]

Every edit is made in a private copy; the tests named beside it must fail there. An edit that no longer finds its place
counts as a failure too: mend the list with the code. Minutes, not part of the default tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]


class Edit(NamedTuple):
    """Replace `right` by `wrong` in src/laconic/`file`: one of `tests` (of those alone whose names have the words `only`) must go red."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str
    only: str = ""


EDITS = [
    Edit(
        "a default device taken over",
        "structures/channels.py",
        'total = torch.zeros(len(site.kept), dtype=torch.float64, device="cpu")',
        "total = torch.zeros(len(site.kept), dtype=torch.float64)",
        "test_neurons",
        "default_device",
    ),
    Edit(
        "other processes' layers forgotten",
        "moments.py",
        "dict.fromkeys(name for sums in everywhere for name in sums)",
        "self._sums",
        "test_neurons",
        "some_processes",
    ),
    Edit(
        "compiled for a look",
        "measure.py",
        'compiled = "torch._dynamo" in sys.modules',
        "compiled = False",
        "test_plan",
        "compiled_on_the_object",
    ),
    Edit("a resume that cannot be", "cli/shared.py", "if resume and not resumes:", "if False:", "test_running", "resuming_nothing"),
    Edit("a rate that is set later forgotten", "schedule.py", "if peak > self.peak:", "if False:", "test_compressor", "built_with"),
    Edit("the user's inputs given away", "measure.py", "return model(*copied(inputs))", "return model(*inputs)", "test_measure", "users"),
    Edit(
        "a bad batch counts",
        "moments.py",
        "finite = torch.isfinite(squares).all()",
        "finite = torch.tensor(True)",
        "test_neurons",
        "not_finite",
    ),
    Edit("hooks on blocks overlooked", "graph/groups.py", "if path and hooked(module):", "if False:", "test_graph", "hook_on_a_block"),
    Edit("hooks on gradients overlooked", "checks.py", "return _users(parameter._backward_hooks, ", "return _users(", "test_plan", "hook"),
    Edit(
        "names of parameters grow stale", "surgery/optimizer.py", 'group["param_names"][:] = names', "pass", "test_compressor", "names_that"
    ),
    Edit("nothing compiled anew", "compressor.py", "if self._compiled:", "if False:", "test_compressor", "begins_anew"),
    Edit(
        "a crashing kernel in the trial",
        "graph/trial.py",
        "_native_kernels() if unsafe_convolutions(model) else",
        "",
        "test_channels",
        "kernel_that",
    ),
    Edit(
        "a narrow shortcut untold",
        "slimming.py",
        "if unsafe:  # said",
        "if False:  # said",
        "test_neurons",
        "too_narrow",
    ),
    Edit(
        "unreached layers untold",
        "compressor.py",
        "for path in self._unreached}, self._reached)",
        "for path in ()}, self._reached)",
        "test_neurons",
        "is_told",
    ),
    Edit("constant on the examples alone", "surgery/constants.py", "LOOKS = 4", "LOOKS = 1", "test_channels", "alone_is_no_constant"),
    Edit("padded depthwise layers forgotten", "surgery/constants.py", "_pads(module)]", "False]", "test_channels", "alone_is_no_constant"),
    Edit(
        "values in training not compared",
        "graph/trial.py",
        "_other_shapes if random else _distance",
        "_other_shapes",
        "test_graph",
        "finds_what",
    ),
    Edit("one example taken once", "graph/trial.py", "(self.inputs, _twice(self.inputs))", "(self.inputs,)", "test_graph", "finds_what"),
    Edit(
        "factors in float64 all at once",
        "surgery/optimizer.py",
        "(w.detach() for w in new)",
        "(w.detach().double() for w in new)",
        "test_memory",
    ),
    Edit("variance over one input", "moments.py", "FEWEST = 8", "FEWEST = 0", "test_neurons", "faintest"),
    Edit("zeroed neurons stay where there is room", "widths.py", "self.bury(group)", "pass", "test_neurons", "zeroed"),
    Edit("zeroed neurons count", "structures/channels.py", ".masked_fill(dead, 0.0)", "", "test_neurons", "zeroed"),
    Edit(
        "calibration forgotten for neurons",
        "compressor.py",
        "if calibration is not None or not state.moments:",
        "if not state.moments:",
        "test_neurons",
        "cut_at_the_end",
    ),
    Edit(
        "other noise after a cut",
        "cuts.py",
        "with evaluating(model), seeded():",
        "with evaluating(model):",
        "test_neurons",
        "random_in_eval",
    ),
    Edit("inputs watched in the warm-up", "compressor.py", "next_progress >= self.schedule.warmup and ", "", "test_neurons", "watched"),
    Edit(
        "copies go on watching",
        "watch.py",
        "        return None\n\n    def __call__",
        "        return self.__dict__\n\n    def __call__",
        "test_neurons",
        "watched",
    ),
    Edit("layers are not tried in a run", "readers.py", "if stand.asked}", "if False}", "test_plan", "read_in_a_run"),
    Edit("a stand-in stays", "readers.py", "parent._modules[name] = before[path]", "pass", "test_plan", "read_in_a_run"),
    Edit("a diverged model is compacted", "compressor.py", "check_trained(self.model)", "pass", "test_errors", "settled"),
    Edit(
        "a changed model is compacted",
        "compressor.py",
        "self._check_parameters([])\n            check",
        "check",
        "test_errors",
        "settling",
    ),
    Edit(
        "two compressors at once",
        "compressor.py",
        "if any(other.model is model",
        "if False and any(other.model is model",
        "test_errors",
        "two_compressors or compressors",
    ),
    Edit(
        "steps beyond the schedule unseen",
        "compressor.py",
        "self.steps == too_many_steps(self.total_steps)",
        "False",
        "test_neurons",
        "many_more",
    ),
    Edit("prices in units of the budget", "widths.py", "0.01 * float(step[0])", "float(step[0])", "test_neurons", "price_is"),
    Edit(
        "structures that select nothing pass",
        "plan.py",
        "if id(structure) not in acting and",
        "if False and",
        "test_errors",
        "nothing or neurons",
    ),
    Edit(
        "calibration images in the order of the set",
        "methods/base.py",
        "return torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(0))[:count]",
        "return torch.arange(len(data.train_x))[:: max(1, len(data.train_x) // count)][:count]",
        "test_methods",
        "calibration",
    ),
    Edit(
        "Polar Express by Muon's coefficients",
        "methods/spectral_penalties.py",
        "for a, b, c in polynomials:",
        "for a, b, c in QUINTIC:",
        "test_methods",
        "polar_express",
    ),
    Edit("states that were taken apart are not given back", "cuts.py", "entries.update(content)", "pass", "test_neurons"),
    Edit("gradients are not given back", "cuts.py", "parameter.grad = gradient", "pass", "test_neurons"),
    Edit("milliseconds: no second look when it settles", "compressor.py", "if self._dense is not None:", "if False:", "test_shrinking"),
    Edit(
        "milliseconds: a bound out of reach ends the run",
        "budget.py",
        "    except InfeasibleBudgetError:\n        plan.fixed_ms",
        "    except ZeroDivisionError:\n        plan.fixed_ms",
        "test_shrinking",
    ),
    Edit("milliseconds: measured anew in every run", "timing.py", "    if key not in known:", "    if True:", "test_shrinking"),
    Edit(
        "large matrices: the first of a stack for all",
        "solvers/eigen.py",
        "_evr(one) for one in gram)",
        "_evr(gram[0].clone()) for one in gram)",
        "test_solvers",
    ),
    Edit("large matrices: by torch", "solvers/eigen.py", "LARGE = 512", "LARGE = 51200", "test_memory"),
    Edit("timing: layers side by side in memory", "timing.py", "leaf.grad = None", "pass", "test_memory"),
    Edit(
        "states sliced at once",
        "surgery/optimizer.py",
        "values = [state.pop(key) for state in states]",
        "values = [state[key] for state in states]",
        "test_memory",
    ),
    Edit("neurons counted once", "widths.py", "COUNTED = 2", "COUNTED = 1", "test_neurons"),
    Edit(
        "neurons of a perceptron counted twice",
        "widths.py",
        "for site in sites) else 1",
        "for site in sites) else 2",
        "test_neurons",
        "counts_twice",
    ),
    Edit("multiples: ranks step by one", "widths.py", "_step_down(rank, multiple)", "_step_down(rank)", "test_neurons"),
    Edit(
        "multiples: the first rank is any",
        "widths.py",
        "in _in_multiples(highest, multiple)]",
        "in _in_multiples(highest, 1)]",
        "test_neurons",
    ),
    Edit("multiples: inputs step by one", "widths.py", "_step_down(inner, multiple)", "_step_down(inner)", "test_inner test_neurons"),
    Edit("multiples: a head counts once", "structures/channels.py", "math.gcd(self.structure.multiple, of_unit)", "1", "test_neurons"),
    Edit("multiples: milliseconds leave sizes free", "budget.py", "return LANES if", "return 1 if", "test_neurons"),
    Edit(
        "slim layers timed by guess", "latency.py", "layer.weight_ms *= scales.get(layer.path, 1.0)", "pass", "test_neurons test_shrinking"
    ),
    Edit(
        "slim layers' time counted twice",
        "latency.py",
        "known(plan.fixed_ms) - sum(x.weight_ms * math.prod(x.dense) for x in free)",
        "known(plan.fixed_ms)",
        "test_neurons test_shrinking",
    ),
    Edit(
        "the share of the milliseconds is told by two days' clocks",
        "outcome.py",
        "latency_before=dense_ms",
        "latency_before=plan.latency_ms",
        "test_shrinking",
    ),
    Edit(
        "two models are timed one after the other",
        "measure.py",
        "statistics.median(a / b for a, b in times)",
        "statistics.median(a for a, _ in times[:4]) / statistics.median(b for _, b in times[4:])",
        "test_measure",
    ),
    Edit(
        "vectors of another axis hold units",
        "graph/operations.py",
        "        op.tracer.forget(op.tensors)\n",
        "        pass\n",
        "test_graph",
    ),
    Edit(
        "vectors of another kind cross units",
        "graph/tracer.py",
        "if rule not in PLACE_BY_PLACE and not self.forget(labelled):",
        "if False:",
        "test_graph",
    ),
    Edit(
        "neurons with a shift of their own are dead",
        "structures/channels.py",
        "dead = torch.zeros_like(dead)",
        "pass",
        "test_neurons",
        "noise_of_its_own",
    ),
    Edit(
        "a number where a vector was saved",
        "surgery/record.py",
        "if type(module).__name__ == slim.kind and missing:",
        "if False:",
        "test_channels",
    ),
    Edit("parameters of the model's own are shared", "graph/groups.py", "if len(holders[id(tensor)]) == 1", "if True", "test_graph"),
    Edit("buffers that no file holds are sliced", "graph/groups.py", "or name in module._non_persistent_buffers_set", "", "test_graph"),
    Edit(
        "frozen parameters of the model's own are sliced",
        "graph/groups.py",
        "tensor.requires_grad is isinstance(tensor, nn.Parameter)",
        "True",
        "test_graph",
    ),
    Edit(
        "the model's own parameters are not counted",
        "plan.py",
        "beside=1.0, side=end.side",
        "beside=0.0, side=end.side",
        "test_neurons",
        "of_the_models_own",
    ),
    Edit(
        "buffers are counted",
        "plan.py",
        "costs_nothing = end.own and end.side in module._buffers",
        "costs_nothing = False",
        "test_neurons",
        "of_the_models_own",
    ),
    Edit("a mark has its parameters, or its counts", "surgery/channels.py", """mark["sizes"] |= counts""", "pass", "test_channels"),
    Edit("a missed bound in milliseconds is not said", "outcome.py", "latency > 1.05 * limit_ms", "False", "test_shrinking"),
    Edit(
        "Tucker's core unpaid",
        "methods/tensor_decompositions.py",
        "o * a + i * b + a * b * kh * kw",
        "o * a + i * b + a * b",
        "test_methods",
    ),
    Edit("CP forgets the signs", "methods/tensor_decompositions.py", "a = a * weights.sign()", "a = -a", "test_methods"),
    Edit("pruned too little", "methods/magnitude.py", "1 - (1 - k / ROUNDS) ** 3", "0.9 - 0.9 * (1 - k / ROUNDS) ** 3", "test_methods"),
    Edit("orthogonality of one side", "methods/svd_training.py", " + (vh @ vh.mT - eye).square().sum()", "", "test_methods"),
    Edit("stable rank of the sum", "methods/cuttlefish.py", "values.square().sum(-1) / values", "values.sum(-1) / values", "test_methods"),
    Edit(
        "inputs without positions",
        "methods/activation_aware.py",
        "rows.mT @ rows",
        "rows.mean(0)[:, None] @ rows.mean(0)[None]",
        "test_methods",
    ),
    Edit(
        "what both cuts keep, of the whole weight",
        "structures/low_rank.py",
        "energies / energies[:, -1:]",
        "energies / energies[-1:, -1:]",
        "test_inner",
    ),
    Edit(
        "three layers that cost more than a pair",
        "widths.py",
        "(rank, _step_down(inner, multiple)), (rank, 0)]",
        "(rank, _step_down(inner, multiple))]",
        "test_inner",
    ),
    Edit("entries of the second cut for nothing", "costs.py", " + s * rates.entry * taken", "", "test_inner"),
    Edit(
        "inputs of another rank",
        "budget.py",
        "(ranks[:, None, None] - 1) * (two - one)",
        "ranks[:, None, None] * (two - one)",
        "test_inner",
    ),
    Edit(
        "a second cut forgotten on resume",
        "compaction.py",
        "for site in (*plan.sites, *plan.inner):\n        if site.name in ranks",
        "for site in plan.sites:\n        if site.name in ranks",
        "test_inner",
    ),
    Edit("a second cut that a resumed run makes up", "compressor.py", 'site.inner.name not in state["inner"]', "False", "test_inner"),
    Edit(
        "what is beside the layers never shrinks", "latency.py", "layer.beside_ms += left", "layer.beside_ms += 0 * left", "test_shrinking"
    ),
    Edit(
        "yesterday's times",
        "latency.py",
        "site.times = site.times.scaled(now / site.times.dense, now / site.times.dense)",
        "pass",
        "test_shrinking",
    ),
    Edit(
        "a clock that wanders",
        "latency.py",
        "whole, of_dense = relative_latency(cut, dense(), inputs)",
        "whole, of_dense = measure_latency(cut, inputs).median_ms / known(plan.latency_ms), known(plan.latency_ms)",
        "test_shrinking",
    ),
    Edit(
        "unread neurons stay",
        "surgery/constants.py",
        "zip(here, read, strict=True) if not r]",
        "zip(here, read, strict=True) if False]",
        "test_neurons",
    ),
    Edit("slices one by one", "structures/entries.py", "if d < weight.ndim}", "if d > weight.ndim}", "test_neurons"),
    Edit(
        "neurons go by default at the end",
        "plan.py",
        "if not trains_on:",
        "if False:",
        "test_neurons",
    ),
    Edit("a run made twice", "bench.py", "lock.acquire(blocking=False)", "pass", "test_bench"),
    Edit("LC without a pull", "methods/learning_compression.py", "weight.lerp_(target, min(1.0, recipe.lr * mu))", "pass", "test_methods"),
    Edit(
        "TRP without truncation",
        "methods/trp.py",
        "module.weight.copy_(unfolding.fold((u * s[..., None, :]) @ vh))",
        "pass",
        "test_methods",
    ),
    Edit(
        "Hoyer without its second term",
        "methods/spectral_penalties.py",
        "factor / norm - ratio * x / norm.square()",
        "factor / norm",
        "test_methods",
    ),
    Edit(
        "pickles may run anything",
        "data/files.py",
        "raise pickle.UnpicklingError(",
        "return super().find_class(module, name) or str(",
        "test_data",
    ),
    Edit(
        "thin widths too wide",
        "models/__init__.py",
        "build(widths).parameters()) <= limit",
        "build(widths).parameters()) <= 2 * limit",
        "test_models",
    ),
    Edit("capital and small letters apart", "data/files.py", "CHARACTERS[label.lower()]", "ord(label) % 36", "test_data"),
    Edit("characters that are left out are counted as kept", "data/files.py", "label.lower() not in CHARACTERS]", "False]", "test_data"),
    Edit("a step late", "training.py", "sum(step >= round(", "sum(step > round(", "test_training"),
    Edit("a milestone between two steps", "training.py", "step >= round(share * total)", "step >= share * total", "test_training"),
    Edit("no momentum", "training.py", "momentum=recipe.momentum", "momentum=0.1", "test_training"),
    Edit("3 x 3 whatever the recipe says", "models/__init__.py", "partial(square, kernel=s.kernel)", "square", "test_models"),
    Edit("text labels not shifted", "data/sets.py", "for start in (0, 1))", "for start in (0, 0))", "test_data"),
    Edit(
        "threshold without lr",
        "compressor.py",
        "state.owed[site.name] += learning_rate(optimizer, weight)",
        "state.owed[site.name] += 0.1",
        "test_compressor",
    ),
    Edit(
        "rate of first group",
        "optimizers.py",
        'return sum(float(g["lr"]) for g in optimizer.param_groups if any(p is weight for p in g["params"]))',
        'return float(optimizer.param_groups[0]["lr"])',
        "test_compressor",
    ),
    Edit(
        "found_inf ignored",
        "optimizers.py",
        "return found is not None and bool(found)",
        "return False",
        "test_amp",
    ),
    Edit(
        "grad None counted",
        "compressor.py",
        "if weight.grad is not None and weight.requires_grad and holds(optimizer, weight):",
        "if weight.requires_grad and holds(optimizer, weight):",
        "test_compressor",
    ),
    Edit(
        "frozen mid-run shrunk",
        "compressor.py",
        "if tau == 0 or not site.weights[0].requires_grad:",
        "if tau == 0:",
        "test_compressor",
    ),
    Edit(
        "stale parameter kept",
        "surgery/optimizer.py",
        "here = [p] if position is None else new if len(old) == 1 else [new[position]]",
        "here = [p] if position is None else [p, *new] if len(old) == 1 else [new[position]]",
        "test_compaction",
    ),
    Edit(
        "stale state kept",
        "surgery/optimizer.py",
        'states = [getattr(optimizer, "state", {}).pop(w, None) for w in old]',
        'states = [getattr(optimizer, "state", {}).get(w, None) for w in old]',
        "test_compaction",
    ),
    Edit(
        "moments swapped",
        "surgery/optimizer.py",
        "return gradient_map(value, 1)\n    if mean",
        "return 2 * gradient_map(value, 1)\n    if mean",
        "test_compaction",
    ),
    Edit(
        "second moment not squared",
        "surgery/optimizer.py",
        "to_left.double().mT.pow(power)",
        "to_left.double().mT.abs()",
        "test_compaction",
    ),
    Edit(
        "centered as uncentered",
        "surgery/optimizer.py",
        'if key == "square_avg" and means[0] is not None:',
        "if False:",
        "test_compaction",
    ),
    Edit(
        "alias dropped on save",
        "checkpoint.py",
        "        if value.numel() and key in first:",
        "        if False:",
        "test_checkpoint",
    ),
    Edit(
        "tie dropped on load",
        "checkpoint.py",
        '    _tie(model, manifest["aliases"])\n',
        "",
        "test_checkpoint",
    ),
    Edit(
        "payload hash unchecked",
        "checkpoint.py",
        'if hashlib.sha256(payload).hexdigest() != manifest["sha256"]:',
        "if False:",
        "test_checkpoint",
    ),
    Edit(
        "record hash unchecked",
        "checkpoint.py",
        '_record_hash(manifest) == manifest["record_sha256"]',
        "True",
        "test_checkpoint",
    ),
    Edit(
        "metadata unchecked",
        "checkpoint.py",
        'if recorded != manifest["record_sha256"]:',
        "if False:",
        "test_checkpoint",
    ),
    Edit(
        "load undo skipped",
        "checkpoint.py",
        "        undo(model, done)\n",
        "",
        "test_checkpoint",
    ),
    Edit(
        "overwrite in place",
        "checkpoint.py",
        "        os.rename(target, aside)",
        "        shutil.rmtree(target)",
        "test_checkpoint",
    ),
    Edit(
        "no fsync",
        "checkpoint.py",
        "        os.fsync(file.fileno())",
        "        pass",
        "test_checkpoint",
    ),
    Edit(
        "cut undo skipped",
        "compaction.py",
        "        undo(model, done)\n",
        "        pass\n",
        "test_compaction",
    ),
    Edit(
        "surgery error unchecked",
        "compaction.py",
        "if not errors[site.name] <= tolerance:",
        "if False:",
        "test_compaction",
    ),
    Edit(
        "weights not restored on refusal",
        "cuts.py",
        "tensor.copy_(value)",
        "pass",
        "test_compaction",
    ),
    Edit(
        "autounfolding chosen anew",
        "compressor.py",
        '        use_unfoldings(self.model, self.plan, state["unfoldings"], self.example_inputs)\n',
        "",
        "test_compaction",
    ),
    Edit(
        "owed not paid by compact",
        "compressor.py",
        "                    self._prox([x for x in self._pressed if self.state.owed[x.name] > 0])\n",
        "",
        "test_compressor",
    ),
    Edit(
        "muon unpaid at cut",
        "compressor.py",
        "if settle_now or self._owner[x.name] is optimizer",
        "if self._owner[x.name] is optimizer",
        "test_compressor",
    ),
    Edit(
        "steer twice",
        "compressor.py",
        "        if not sites:  #",
        "        if False:  #",
        "test_compressor",
    ),
    Edit(
        "relative unit frobenius",
        "structures/low_rank.py",
        "site.norm / math.sqrt(u.groups * min(u.m, u.n))",
        "site.norm / math.sqrt(u.groups * max(u.m, u.n))",
        "test_compressor test_compaction",
    ),
    Edit(
        "tied not shared",
        "structures/low_rank.py",
        "            pair[0].weight, pair[1].weight = pairs[0][0].weight, pairs[0][1].weight\n",
        "            pass\n",
        "test_compressor test_compaction",
    ),
    Edit(
        "break-even off by one",
        "structures/low_rank.py",
        "return (self.unfolding.dense_params - 1) // self.unfolding.unit_params",
        "return self.unfolding.dense_params // self.unfolding.unit_params",
        "test_compressor test_compaction",
    ),
    Edit(
        "only first path",
        "compaction.py",
        "done.extend((path, put(model, path, pair)) for path in paths)",
        "done.extend((path, put(model, path, pair)) for path in paths[:1])",
        "test_compaction",
    ),
    Edit(
        "bn momentum kept",
        "surgery/batchnorm.py",
        "            layer.momentum = None  # cumulative average\n",
        "",
        "test_compaction",
    ),
    Edit(
        "bn not restored",
        "surgery/batchnorm.py",
        "                buffer.copy_(buffers[name])",
        "                pass",
        "test_compaction",
    ),
    Edit(
        "readers unseen",
        "plan.py",
        "    readers = weight_readers(modules)",
        "    readers = {}",
        "test_plan",
    ),
    Edit(
        "hooks ignored",
        "plan.py",
        "if hooked(module) and not is_sharded(parameter):",
        "if False:",
        "test_plan",
    ),
    Edit(
        "parametrized ignored",
        "plan.py",
        'if type(module).__name__ == "ParametrizationList" or attribute in ("weight_g", "weight_v", "weight_orig"):',
        "if False:",
        "test_plan",
    ),
    Edit(
        "attention uncounted",
        "measure.py",
        "        with sdpa_kernel(SDPBackend.MATH):\n            yield",
        "        yield",
        "test_measure",
    ),
    Edit("hooks lost in silence", "compaction.py", "or any(map(has_gradient_hooks, s.weights))]", "]", "test_compressor", "put_on_later"),
    Edit(
        "hooks on slim weights lost in silence",
        "slimming.py",
        "any(map(has_gradient_hooks, parameters))",
        "False",
        "test_compressor",
        "put_on_later",
    ),
    Edit(
        "our own hooks warned of",
        "checks.py",
        'any(not type(hook).__module__.startswith(f"{__package__}.") for',
        "any(True for",
        "test_compressor",
        "laconics_own",
    ),
    Edit(
        "a tied weight asked for under both names",
        "checkpoint.py",
        "            state[name] = state[given]",
        "            pass",
        "test_checkpoint",
        "one_of_its_names",
    ),
    Edit(
        "packed values not refused", "checkpoint.py", "if is_traceable_wrapper_subclass(value):", "if False:", "test_checkpoint", "packed"
    ),
    Edit(
        "dropout hides what training does",
        "graph/trial.py",
        "with NoDropout():",
        "with contextlib.nullcontext():",
        "test_graph",
        "does_not_hide_what_training",
    ),
    Edit("units rolled", "graph/operations.py", '_rolled: "roll"', '_moved: "roll"', "test_graph", "mixes_the_units"),
    Edit(
        "modes not restored",
        "measure.py",
        "            module.training = training",
        "            pass",
        "test_measure",
        "scripted or modes",
    ),
    Edit("calls counted by looking", "measure.py", "            module.__dict__.update(attributes)\n", "", "test_measure", "counts"),
    Edit(
        "a scripted layer asked for its forward",
        "matricize.py",
        'getattr(type(module), "forward", None)',
        "type(module).forward",
        "test_plan",
        "scripted",
    ),
    Edit(
        "buffers that were replaced not put back",
        "measure.py",
        "                module._buffers[name] = buffer",
        "                pass",
        "test_measure",
        "counts",
    ),
    Edit(
        "buffers that were written to not put back",
        "measure.py",
        "                    buffer.copy_(value)",
        "                    pass",
        "test_measure",
        "counts",
    ),
    Edit(
        "calls counted from trial to trial",
        "graph/trial.py",
        "with as_it_was(model), torch.no_grad()",
        "with torch.no_grad()",
        "test_measure",
        "counts",
    ),
    Edit(
        "rounding too coarse",
        "allocate.py",
        "computed = min(epsilon, 2.0**-23)",
        "computed = epsilon",
        "test_amp",
    ),
    Edit(
        "warmup ignored",
        "compressor.py",
        "if not (state.settled or (self.budget is not None and self.progress < self.schedule.warmup)):",
        "if not state.settled:",
        "test_compressor",
    ),
    Edit(
        "lbfgs accepted",
        "optimizers.py",
        "if isinstance(o, torch.optim.LBFGS):",
        "if False:",
        "test_errors",
    ),
    Edit(
        "max diff in train mode",
        "cuts.py",
        "    with evaluating(model), seeded():",
        "    with torch.no_grad(), seeded():",
        "test_compaction",
    ),
    Edit(
        "fused prox in autocast",
        "solvers/prox.py",
        "enabled=False",
        "enabled=True",
        "test_amp",
    ),
    Edit(
        "prox adds instead of subtracting",
        "penalties.py",
        "return (s - check_tau(tau)).clamp_min(0)",
        "return (s + check_tau(tau)).clamp_min(0)",
        "test_penalties",
    ),
    Edit(
        "cutoff of LogSum at zero",
        "penalties.py",
        "return torch.where(s > self.cutoff(tau),",
        "return torch.where(s > 0,",
        "test_penalties",
    ),
    Edit(
        "fold without its permutation",
        "matricize.py",
        ".permute(inverse)",
        "",
        "test_matricize",
    ),
    Edit(
        "gram of the larger side",
        "solvers/gram.py",
        "tall = x.shape[-2] > x.shape[-1]",
        "tall = x.shape[-2] < x.shape[-1]",
        "test_solvers",
    ),
    Edit(
        "prox off by the scale",
        "solvers/base.py",
        "return penalty.prox(s * scale, tau) / scale",
        "return penalty.prox(s, tau)",
        "test_solvers",
    ),
    Edit(
        "stride on both layers",
        "surgery/factorize.py",
        "            return (values[0], *ones) if second else (neutral, *values[1:])",
        "            return values",
        "test_factorize",
    ),
    Edit(
        "sum instead of product",
        "allocate.py",
        "return np.log1p(-np.minimum(lost / total, 1 - 1e-16))",
        "return -lost",
        "test_allocate",
    ),
    Edit(
        "neuron's bias not in its norm",
        "structures/channels.py",
        "energy = energy + bias.detach().double().cpu().square()",
        "pass",
        "test_neurons",
    ),
    Edit(
        "least important neurons kept",
        "widths.py",
        'order = np.argsort(-importance, kind="stable")',
        'order = np.argsort(importance, kind="stable")',
        "test_neurons",
    ),
    Edit(
        "what neurons put out is lost",
        "slimming.py",
        "        fold_means(model, tied, kept, means)\n",
        "        pass\n",
        "test_neurons",
    ),
    Edit(
        "walk forgets what a step saves elsewhere",
        "widths.py",
        "affected = {n for path in changed for n in self.touching[path]} | {name}",
        "affected = {name}",
        "test_neurons",
    ),
    Edit(
        "importances not cut with the neurons",
        "compressor.py",
        "state.importances[group.name] = share / max(share.sum(), math.ulp(0.0))",
        "pass",
        "test_neurons",
    ),
    Edit(
        "plan not told of the new widths",
        "slimming.py",
        "layer.site.resize(layer.out, layer.taken)",
        "pass",
        "test_neurons",
    ),
    Edit(
        "half precision excuses a wrong removal",
        "slimming.py",
        "min(torch.finfo(dtype).eps",
        "max(torch.finfo(dtype).eps",
        "test_neurons",
        "belong",
    ),
    Edit(
        "rounding taken for a wrong removal",
        "slimming.py",
        "off = difference(copy.deepcopy(model).to(torch.float64), tied, kept, cast(inputs, torch.float64))",
        "pass",
        "test_neurons",
        "blows_up",
    ),
    Edit(
        "a trial in the precisions that the code names",
        "graph/trial.py",
        "OneDtype(dtype) if dtype is not None else contextlib.nullcontext()",
        "contextlib.nullcontext()",
        "test_graph",
        "casts_between",
    ),
    Edit(
        "a copy of a compressor that hangs on nothing",
        "compressor.py",
        "        self._attach()\n        if not",
        "        self._attached, self._alarm, self._watch, self._inputs, self._handles = True, None, None, None, []\n        if not",
        "test_neurons",
        "copied_together",
    ),
    Edit(
        "gradients of a copy not scaled",
        "compressor.py",
        "= scale_gradients(self.plan.sites, self.state.gradient_scales)",
        "= []",
        "test_neurons",
        "copied_together",
    ),
]


def survives(edit: Edit) -> str | None:
    """None if the tests go red, else what went wrong."""
    source = (ROOT / "src/laconic" / edit.file).read_text()
    if edit.right not in source:
        return "its place is not in the source any more"
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in ("src", "tests", "benchmarks"):
            shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "src/laconic" / edit.file).write_text(source.replace(edit.right, edit.wrong))
        files = [f"tests/{name}.py" for name in edit.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *(["-k", edit.only] if edit.only else [])]
        done = subprocess.run(
            command, cwd=copy, env={**os.environ, "PYTHONPATH": str(copy / "src")}, capture_output=True, text=True, check=False
        )
    if done.returncode == 1:
        return None
    return f"the tests {'passed' if done.returncode == 0 else 'could not run: ' + done.stdout[-300:]}"


def main(words: list[str]) -> int:
    chosen = [edit for edit in EDITS if all(word in edit.name for word in words)]
    survivors = 0
    for edit in chosen:
        problem = survives(edit)
        survivors += problem is not None
        sys.stdout.write(f"{'red' if problem is None else 'SURVIVED: ' + problem:<10} {edit.name}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - survivors} red, {survivors} survived\n")
    return 1 if survivors or not chosen else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
