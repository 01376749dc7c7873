"""Plant known faults one at a time in a copy of the package, and see which test notices.

    python scripts/mutants.py            all of them
    python scripts/mutants.py NAME ...   only these

Each of these faults once passed all tests, or is the kind that would: the
program runs, the loss falls, and a number is wrong. A copy of llama_tut with
the fault stands in front of the real one, and the few tests named beside it
run. One that passes all the same has SURVIVED: write the test that sees it.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Mutant(NamedTuple):
    """A fault: in `file`, `old` becomes `new`; one of `tests` must fail."""

    name: str
    file: str  # in llama_tut/
    old: str  # stands there exactly once
    new: str
    tests: str  # pytest's names in tests/, with spaces between


OPTIONS = "test_training_options.py::test_"
MUTANTS = [
    # The model
    Mutant(
        "default eps of RMSNorm",
        "rmsnorm.py",
        "eps=1e-5",
        "eps=1e-6",
        "test_rmsnorm.py::test_the_default_eps_is_that_of_llama_3",
    ),
    Mutant(
        "causal mask counted from the first key",
        "attention.py",
        "if attention_mask is None and 1 < T < S:",
        "if False:",
        "test_attention.py::test_none_is_the_causal_mask",
    ),
    Mutant(
        "depth-scaled initialisation on up_proj",
        "mlp.py",
        "stds = std, std, output_std",
        "stds = std, output_std, std",
        "test_mlp.py::test_init_weights_draws_the_output_matrix_apart",
    ),
    Mutant(
        "depth-scaled initialisation dropped",
        "model.py",
        "writes = std / (2 * self.config.num_hidden_layers) ** 0.5",
        "writes = std",
        "test_model.py::test_initialisation",
    ),
    Mutant(
        "attention FLOPs halved",
        "model.py",
        "reads = 4 * L",
        "reads = 2 * L",
        "test_model.py::test_flops_of_plain_attention",
    ),
    Mutant(
        "padded targets count",
        "model.py",
        "F.cross_entropy(logits.flatten(0, -2), targets.flatten())",
        "F.cross_entropy(logits.flatten(0, -2), targets.flatten().relu())",
        "test_model.py::test_loss_of_a_text",
    ),
    # Generation
    Mutant(
        "top-p keeps one token more at the boundary",
        "generate.py",
        "before < top_p",
        "before <= top_p",
        "test_generate.py::test_top_p_keeps_the_token_that_crosses",
    ),
    # Data
    Mutant(
        "no separator between documents",
        "tools/encoding.py",
        "front = np.array([separator], np.uint32)",
        "front = np.array([], np.uint32)",
        "tools/test_prepare.py::"
        "test_a_separator_stands_in_front_of_each_document",
    ),
    Mutant(
        "bits per byte from training text",
        "tools/prepare.py",
        'known["val_bytes"] / known["val_tokens"]',
        'known["train_bytes"] / known["train_tokens"]',
        "tools/test_prepare.py::test_bits_a_byte_are_of_the_validation_text",
    ),
    # The step
    Mutant(
        "schedule one step late",
        "optimizer.py",
        "done = step + 1",
        "done = step",
        "test_optimizer.py::test_schedule",
    ),
    Mutant(
        "loop asks for the learning rate one step late",
        "trainer.py",
        'group["lr"] = learning_rate(step)',
        'group["lr"] = learning_rate(max(step - 1, 0))',
        f"{OPTIONS}warmup_steps {OPTIONS}schedule test_trainer.py",
    ),
    Mutant(
        "clipping removed",
        "trainer.py",
        "max_norm or math.inf",
        "math.inf",
        f"{OPTIONS}max_norm",
    ),
    Mutant(
        "Muon without Nesterov",
        "optimizer.py",
        "ahead = torch._foreach_lerp(gradients, means, momentum)",
        "ahead = means",
        "test_optimizer.py::test_muon_is_nesterovs",
    ),
    Mutant(
        "a step that is not finite is taken",
        "trainer.py",
        "if not (math.isfinite(loss) and math.isfinite(norm)):",
        "if not math.isfinite(loss):",
        "test_trainer.py::test_a_step_that_is_not_finite_is_not_taken",
    ),
    Mutant(
        "evaluation without model.eval()",
        "trainer.py",
        "    model.eval()\n    for first",
        "    for first",
        "test_trainer.py::"
        "test_validation_is_in_eval_mode_and_training_goes_on_in_its_own",
    ),
    # Options that are read and not used
    Mutant(
        "training without autocast",
        "pretraining.py",
        "autocast=run.autocast,\n        sync=partial(",
        "sync=partial(",
        f"{OPTIONS}dtype",
    ),
    Mutant(
        "weight_decay not used",
        "pretraining.py",
        "config.weight_decay,",
        "0.1,",
        f"{OPTIONS}weight_decay",
    ),
    Mutant(
        "max_norm not used",
        "pretraining.py",
        "max_norm=config.max_norm",
        "max_norm=1.0",
        f"{OPTIONS}max_norm",
    ),
    Mutant(
        "betas not used",
        "pretraining.py",
        "(config.beta1, config.beta2)",
        "(0.9, 0.95)",
        f"{OPTIONS}beta1 {OPTIONS}beta2",
    ),
    Mutant(
        "vocab_multiple ignored",
        "tools/options.py",
        "math.ceil(info.vocab_size / multiple) * multiple",
        "info.vocab_size",
        f"{OPTIONS}vocab_multiple",
    ),
    Mutant(
        "MFU without the number of ranks",
        "pretraining.py",
        "(peak * run.ranks.world_size)",
        "peak",
        f"{OPTIONS}mfu_counts_the_ranks",
    ),
    Mutant(
        "choice control not exchanged",
        "tools/choice.py",
        "choices.contexts.roll(1, 0)",
        "choices.contexts",
        "tools/test_choice.py::test_choice_of_an_oracle_and_of_its_control",
    ),
    # Ranks
    Mutant(
        "gradients sent every micro step",
        "distributed.py",
        "with nullcontext() if last else no_sync():",
        "with nullcontext():",
        "test_distributed.py::test_gradients_are_held_back_until_the_last",
    ),
    Mutant(
        "error of one rank unheard by the others",
        "tools/ranks.py",
        "for one in gather_objects(text, group):",
        "for one in [text]:",
        "tools/test_ranks.py::test_an_error_of_one_rank_reaches_all",
    ),
    # Checkpoints
    Mutant(
        "optimizer's state not put back",
        "checkpoint.py",
        "**averages, **drawn}",
        "**drawn}",
        "test_checkpoint.py::test_resumed_run_is_the_same_bit_for_bit",
    ),
    Mutant(
        "random states not put back",
        "checkpoint.py",
        'torch.set_rng_state(states["cpu"])',
        "pass",
        "test_checkpoint.py::"
        "test_random_states_come_back_to_the_rank_that_had_them",
    ),
    Mutant(
        "a checkpoint of NaN is saved",
        "checkpoint.py",
        "not tensor.is_floating_point() or tensor.isfinite().all()",
        "True",
        "test_checkpoint.py::test_what_is_not_finite_is_never_saved",
    ),
    Mutant(
        "a manifest that lists too little is believed",
        "checkpoint.py",
        "for name in names_of_parts(manifest):\n            if name not in files:",
        "for name in files:\n            if False:",
        "test_checkpoint.py::test_a_manifest_must_list_every_part",
    ),
    Mutant(
        "saving before the first step counts as one",
        "checkpoint.py",
        "if not (optimizer.state or make):",
        "if False:",
        "test_checkpoint.py::"
        "test_saving_before_the_first_step_changes_nothing",
    ),
    # Experts
    Mutant(
        "weights of the chosen experts not renormalised",
        "moe.py",
        "return scores, chosen, weights / weights.sum(-1, keepdim=True)",
        "return scores, chosen, weights",
        "test_moe.py::test_equal_experts_are_one_dense_mlp",
    ),
    Mutant(
        "bias that chooses also weighs",
        "moe.py",
        "weights = scores.gather(-1, chosen)",
        "weights = choice.gather(-1, chosen)",
        "test_moe.py::test_the_bias_chooses_and_is_not_in_the_weights",
    ),
    Mutant(
        "bias nudged towards the load",
        "moe.py",
        "torch.sign(mean - load)",
        "torch.sign(load - mean)",
        "test_moe.py::test_biases_are_nudged_against_the_load_and_saved",
    ),
    Mutant(
        "balancing term not scaled under accumulation",
        "moe.py",
        "out = out + self.config.balance * (term - term.detach())",
        "(self.config.balance * term).backward(retain_graph=True)",
        "test_moe.py::test_right_under_accumulation",
    ),
    Mutant(
        "load counted again when a layer is recomputed",
        "moe.py",
        "self.latest = scores, chosen\n",
        "self.latest = scores, chosen\n"
        "        self.load += count_rows(chosen, scores.shape[1])\n",
        "test_moe.py::test_right_under_activation_checkpointing",
    ),
    Mutant(
        "rows of the validation counted",
        "moe.py",
        "if targets is None or not self.training:",
        "if targets is None:",
        "test_moe.py::test_validation_counts_nothing",
    ),
    Mutant(
        "gradients of spread experts summed over ranks",
        "moe.py",
        "own.register_hook(lambda gradient: gradient / self.W)",
        "pass",
        "test_moe.py::test_spread_experts_are_those_of_one_process",
    ),
]


def planted(mutant, source):
    """The source with the fault; raises ValueError when it does not apply."""
    if source.count(mutant.old) != 1:
        raise ValueError(
            f"{mutant.name}: llama_tut/{mutant.file} holds its old text "
            f"{source.count(mutant.old)} times; bring scripts/mutants.py up "
            "to date"
        )
    return source.replace(mutant.old, mutant.new)


def tests_that_fail(mutant, folder):
    """Plant the fault in a copy in `folder`; the first test that fails."""
    package = folder / "llama_tut"
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "llama_tut", package, ignore=ignore)
    path = package / mutant.file
    path.write_text(planted(mutant, path.read_text()))
    tests = [str(ROOT / "tests" / name) for name in mutant.tests.split()]
    # By default pytest puts the folder of conftest.py, which holds the real
    # package, in front of PYTHONPATH; importlib's mode does not.
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "--no-header",
            "-p", "no:cacheprovider", "--tb=no", "--import-mode=importlib",
            *tests,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode not in (0, 1):  # 4, 5: no such test
        raise SystemExit(f"{mutant.name}: {done.stdout}{done.stderr}")
    failed = [
        line.split()[1] for line in done.stdout.splitlines()
        if line.startswith(("FAILED", "ERROR"))
    ]  # fmt: skip
    return failed[0].split("tests/")[-1] if failed else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="faults to plant (all)")
    names = parser.parse_args().names
    known = {mutant.name for mutant in MUTANTS}
    for name in set(names) - known:
        parser.error(f"no fault {name!r}: take one of {sorted(known)}")
    survived = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            test = tests_that_fail(mutant, Path(folder))
        said = f"caught by {test}" if test else "SURVIVED"
        seconds = time.monotonic() - began
        print(f"{mutant.name:46} {seconds:4.0f} s  {said}", flush=True)
        if not test:
            survived.append(mutant.name)
    if survived:
        print(f"{len(survived)} survived: {', '.join(survived)}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
