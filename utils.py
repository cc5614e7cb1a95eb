"""Training and evaluation as a whole: the metrics, whole checkpoints, runs and processes, the callbacks, GLMTrainer."""

import contextlib
import errno
import fcntl
import functools
import glob
import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import unicodedata
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener, wait

import numpy as np
import paddle
import paddle.distributed as dist
from paddle.distributed import fleet
from paddle.distributed.fleet.meta_parallel import get_rng_state_tracker
from paddlenlp.metrics import BLEU
from paddlenlp.trainer import EarlyStoppingCallback, Trainer
from paddlenlp.trainer.trainer_callback import PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from paddlenlp.trainer.trainer_utils import IntervalStrategy, SchedulerType, TrainOutput
from paddlenlp.transformers import BasicTokenizer
from paddlenlp.utils.log import logger
from rouge import Rouge
from tqdm import tqdm

from data import GroupedBatchSampler, InputError, decode_target
from generation import beam_search
from modeling import (
    cast_weights,
    memory_peak,
    merge_lora,
    prepare_for_training,
    read_optimizer_state,
    read_weights,
    target_losses,
)

NEVER = 2**62  # a step that is never reached
CHECKPOINT_DONE = ".checkpoint_done"  # the last file of a checkpoint to be written, which says what the others are
UNFINISHED = ".unfinished"  # the folder in which a run writes what it leaves behind, before it stands in output_dir
LOCK = ".lock"  # the file in output_dir that a run holds while it writes there
MOST_SKIPPED = 10  # losses in a row that may be no numbers, if gradients are scaled
ADVICE = "lower --learning_rate, or look at the data of that step"


def prediction_row(tokenizer, record, hypotheses, candidates=False):
    """What a predictions file holds of a record, dict.

    Args: hypotheses: list of (token ids, score), the best first. candidates (bool): whether to show them all.
    """
    shown = [
        {"prediction": decode_target(tokenizer, token_ids), "score": score, "token_ids": token_ids}
        for token_ids, score in hypotheses
    ]
    row = {key: record[key] for key in ("id", "context", "answer")}
    row.update(reference=record["question"], **shown[0])
    row["rougel"] = None if row["reference"] is None else rouge(row["prediction"], row["reference"])["rougel"]
    return {**row, "candidates": shown} if candidates else row


# --------------------------------------------------------------------------------------------------------- metrics


@functools.lru_cache(maxsize=None)
def _basic_tokenizer():
    return BasicTokenizer(do_lower_case=True)


def _words(text):
    """What counts, in NFKC as the tokenizer has it: a Chinese character, a run of Latin letters or digits, a mark."""
    return _basic_tokenizer().tokenize(unicodedata.normalize("NFKC", text))


def rouge(prediction, reference):
    """ROUGE-1, ROUGE-2 and ROUGE-L (F1) of two texts, over ``_words``, each 0..1. An empty text scores 0."""
    prediction, reference = _words(prediction), _words(reference)
    if not (prediction and reference):
        return {"rouge1": 0.0, "rouge2": 0.0, "rougel": 0.0}
    # The package finds the common subsequence by recursion, one level a word.
    sys.setrecursionlimit(max(sys.getrecursionlimit(), len(prediction) + len(reference) + 1000))
    # It splits sentences at ".": numbers in place of words have none.
    numbers = {word: str(number) for number, word in enumerate(dict.fromkeys(prediction + reference))}
    texts = (" ".join(numbers[word] for word in words) for words in (prediction, reference))
    (scores,) = Rouge(exclusive=False).get_scores(*texts)
    return {f"rouge{kind}": scores[f"rouge-{kind}"]["f"] for kind in "12l"}


def compute_metrics(predictions, references):
    """``rouge``, the mean over the records, and corpus BLEU-4 over the same words, each 0..1.

    Args: two lists of str of the same length.
    """
    bleu = BLEU(n_size=4)
    scores = []
    for prediction, reference in zip(predictions, references):
        bleu.add_inst(_words(prediction), [_words(reference)])
        scores.append(rouge(prediction, reference))
    metrics = {name: sum(score[name] for score in scores) / len(scores) for name in scores[0]}
    # Without a single generated word BLEU's brevity penalty has no value, and its limit is 0.
    metrics["bleu4"] = bleu.score() if bleu.bp_c else 0.0
    return metrics


# ----------------------------------------------------------------------------------------------------- checkpoints


def write_whole(path, text):
    """Write a file whole or not at all."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def of_all(value):
    """The ``value`` that each process of the run has, list in their order. All of them have to call it."""
    values = [value]
    if dist.get_world_size() > 1:
        values = []
        dist.all_gather_object(values, value)
    return values


class Fault(BaseException):  # as KeyboardInterrupt: a signal must pass what catches every Exception while loading
    """What ended a run and was no mistake of the user's, told in one line."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


def read_mark(checkpoint):
    """What the last file of a checkpoint says, dict: the other ``files`` by name, each with its size in bytes and its
    checksum; ``parameters``, what the model calls those that the optimizer's state names; ``records`` of a step. Empty
    where an older run or another script wrote it.
    """
    try:
        with open(os.path.join(checkpoint, CHECKPOINT_DONE), encoding="utf-8") as file:
            return json.loads(file.read() or "{}")
    except (OSError, ValueError):
        return {}


def checksums(folder, names):
    """Sizes and checksums of files, {name: [bytes, BLAKE2b]}, or [None, None] of one that can't be read.

    The processes of a node share the work. All of them have to call it, and each is given the whole.
    """
    processes, found = int(os.environ.get("PADDLE_LOCAL_SIZE", 1)), {}
    for name in sorted(names)[dist.get_rank() % processes :: processes]:
        digest = hashlib.blake2b(digest_size=16)
        try:
            with open(os.path.join(folder, name), "rb") as file:
                while chunk := file.read(1 << 24):
                    digest.update(chunk)
                found[name] = [file.tell(), digest.hexdigest()]
        except OSError:
            found[name] = [None, None]
    first = dist.get_rank() // processes * processes
    return {name: value for part in of_all(found)[first : first + processes] for name, value in part.items()}


def find_damage(checkpoint):
    """What is wrong with a checkpoint, by the sizes and checksums in its mark, str, or None.

    All processes have to call it, for what one of them finds counts for all.
    """
    expected, damage = read_mark(checkpoint).get("files", {}), None
    for name, (size, digest) in checksums(checkpoint, expected).items():
        if [size, digest] != expected[name]:
            damage = f"its {name} is " + ("missing" if size is None else f"not what was written ({size} bytes)")
    return next(filter(None, of_all(damage)), None)


def whole_checkpoints(folder):
    """The paths of the checkpoints in ``folder`` that were written to their end, the last one first."""
    whole = {}
    for path in glob.glob(os.path.join(glob.escape(folder), "checkpoint-*[0-9]")):
        try:
            whole[path] = os.path.getmtime(os.path.join(path, CHECKPOINT_DONE))
        except FileNotFoundError:
            advice = "if it is another script's, give it by --resume_from_checkpoint"
            logger.warning(f"skipping {path}, which was not written to its end; {advice}")
    # By time, not by number, for an older run that --overwrite_output_dir wrote over may have come further.
    return sorted(whole, key=whole.get, reverse=True)


def last_whole_checkpoint(args):
    """The checkpoint of the output folder that was last written to its end and is as it was then, or None.

    All processes have to call it.
    """
    first, *others = of_all(whole_checkpoints(args.output_dir))
    for path in first:
        if not all(path in other for other in others):  # machines may have folders of their own
            continue
        damage = find_damage(path)
        if damage is None:
            return path
        logger.warning(f"skipping {path}, which is damaged: {damage}")
    return None


def where_to_resume(args):
    """What the last line of a run that ended early says, str."""
    checkpoint = next(iter(whole_checkpoints(args.output_dir)), None)
    if checkpoint is None:
        return "there is no checkpoint to resume from"
    without = " without --overwrite_output_dir" if args.overwrite_output_dir else ""
    return f"the same command{without} goes on from {checkpoint}"


# ------------------------------------------------------------------------------------------------ runs and processes


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of the output ``folder``, made if need be; "": none. Raises InputError while another run has it.

    The system takes it from a process that ends, however it does. Of several processes of a run the first has it.
    """
    path, made = os.path.join(folder, LOCK), not os.path.exists(folder)
    owner = file = None
    if folder and dist.get_rank() == 0:
        try:
            os.makedirs(folder, exist_ok=True)
            while file is None or os.fstat(file.fileno()).st_nlink == 0:  # a run that ended meanwhile took it away
                file = open(path, "a+", encoding="utf-8")
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        except OSError as error:  # what can't be written is told by those who check it; some systems know no locks
            if file and error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                owner = file.read().strip() or "one that has just begun"
    owner = of_all(owner)[0]
    if owner:
        raise InputError(
            f"--output_dir {folder} is in use by another run, {owner}: wait for its end, or give another folder"
        )
    try:
        yield
    finally:
        if file:
            with contextlib.suppress(OSError):
                os.remove(path)
            file.close()
            if made:
                with contextlib.suppress(OSError):  # something was written
                    os.rmdir(folder)


class Peers:
    """Ends this process when another one of the run is gone, for which it would wait in a collective for ever.

    The first process has a connection to each of the others, which the system closes when either end dies, and passes
    on who did. One that ends by itself says so before: the others get some seconds to do the same.
    """

    def __init__(self, advice):
        self.advice, self.ending, self.failed = advice, False, False
        rank, count = dist.get_rank(), dist.get_world_size()
        host, key = os.environ["PADDLE_CURRENT_ENDPOINT"].rpartition(":")[0], os.urandom(16)
        listener = Listener((host, 0), backlog=count, authkey=key) if rank == 0 else None
        address, key = of_all(listener and (listener.address, key))[0]
        self.ranks = {}  # by connection
        if rank:
            self.ranks[Client(address, authkey=key)] = 0
            self.tell(b"%d" % rank)
        else:
            while len(self.ranks) < count - 1:
                with contextlib.suppress(AuthenticationError, EOFError, ConnectionError):  # a stranger's
                    connection = listener.accept()
                    self.ranks[connection] = int(connection.recv_bytes())
            listener.close()
        for connection in self.ranks:  # a machine that is gone closes nothing
            with socket.socket(fileno=os.dup(connection.fileno())) as peer:
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, number in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
                    if hasattr(socket, option):
                        peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), number)
        threading.Thread(target=self.watch, daemon=True).start()

    def tell(self, word):
        for connection in self.ranks:
            with contextlib.suppress(OSError):
                connection.send_bytes(word)

    def watch(self):
        watched = dict(self.ranks)
        while watched:
            for connection in wait(list(watched)):
                rank, word = watched.pop(connection), None
                with contextlib.suppress(EOFError, OSError):
                    word = connection.recv_bytes()
                if word == b"done":
                    continue
                if word == b"ending":
                    deadline = time.monotonic() + 5
                    while time.monotonic() < deadline and not (self.ending or self.failed):
                        time.sleep(0.05)
                elif word:
                    rank = int(word)
                if self.ending:
                    return
                self.tell(b"%d" % rank)
                text = f"process {rank} is gone, so this one of {dist.get_world_size()} ends too: {self.advice()}"
                print(f"finetune_generation.py: error: {text}", file=sys.stderr, flush=True)
                os._exit(1)

    def explain(self):
        """After an exception: where it came from another process's end, this one ends here and says so."""
        for number in (signal.SIGINT, signal.SIGTERM):  # a launcher's, which has seen it, too
            signal.signal(number, signal.SIG_IGN)
        self.failed = True
        time.sleep(2)

    def leave(self, word):
        """Say to the others that this process is b"done", or is b"ending" early."""
        self.ending = True
        self.tell(word)


# ------------------------------------------------------------------------------------------------------- callbacks


class TrainingProgress(TrainerCallback):
    """A bar with loss and samples/s on a terminal; elsewhere a line for each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        disable = args.disable_tqdm or not state.is_world_process_zero
        steps = {"total": state.max_steps, "initial": state.global_step, "unit": "step"}
        self.bar = tqdm(desc="train", disable=disable, dynamic_ncols=True, **steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in logs or not state.is_world_process_zero:
            return
        rate = f"{logs['interval_samples_per_second']:.2f} samples/s"
        if self.bar.disable:
            learning_rate = f"learning rate {logs['learning_rate']:.3g}"
            logger.train(
                f"step {state.global_step}/{state.max_steps}: loss {logs['loss']:.4f}, {learning_rate}, {rate}"
            )
        else:
            self.bar.set_postfix_str(f"loss {logs['loss']:.4f}, {rate}")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


class SeedEachStep(TrainerCallback):
    """Each step draws from generators that are seeded by --seed and its number, so that a resumed run draws alike.

    A checkpoint can't hold the generators' states: pickling loses that of Paddle's generator on a CPU.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        seed = int(np.random.default_rng([args.seed, state.global_step, args.dataset_rank]).integers(2**40)) * 1024
        tracker = get_rng_state_tracker()
        tracker.reset()
        # Alike on all processes of tensor parallelism, but for the last, which drops in heads that are split over them.
        tracker.add("embedding_seed", seed + 1)
        tracker.add("global_seed", seed + 2)
        tracker.add("local_seed", seed + 3 + max(args.tensor_parallel_rank, 0))
        paddle.seed(seed)


class StopBySignal(TrainerCallback):
    """SIGINT and SIGTERM end training within a step, of several processes within two, with a checkpoint of it.

    At once where evaluation takes long, or by a second signal.
    """

    number = None  # of the signal that training is to end by, the same on all processes
    received = 0  # the number that this process has got
    asked = None  # the largest that any has got, being exchanged since the step before
    previous = None  # the handlers before training began

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.received, first = 0, time.monotonic()

        def note(number, _):
            nonlocal first
            # Paddle's launcher sends one up to three times in 0.6 seconds.
            if args.world_size > 1 and self.received and time.monotonic() - first < 2:
                return
            if self.received or not model.training:
                self.stop(number, args, state)
            self.received, first = number, time.monotonic()

        self.previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}

    def agree(self, args):
        """Let ``number`` be what any process had got when this was called last, and ask what they have got now."""
        if args.world_size == 1:
            self.number = self.received or None
            return
        if self.asked is not None:
            exchange, numbers = self.asked
            exchange.wait()
            self.number = numbers.item() or None
        numbers = paddle.to_tensor(self.received)
        self.asked = dist.all_reduce(numbers, dist.ReduceOp.MAX, sync_op=False), numbers

    def on_optimizer_end(self, args, state, control, **kwargs):
        self.agree(args)  # where a GradScaler has just waited for the device, which this then need not do
        if self.number is not None:  # before on_step_end, where others act on what is to be saved
            control.should_save = args.save_strategy != IntervalStrategy.NO

    def on_step_end(self, args, state, control, **kwargs):
        if self.number is not None:
            control.should_evaluate = False
            if args.save_strategy == IntervalStrategy.NO:
                self.stop(self.number, args, state)

    def on_save(self, args, state, control, **kwargs):
        if self.number is not None:
            self.stop(self.number, args, state)

    def on_train_end(self, args, state, control, **kwargs):
        for _ in range(2):  # what was asked before, and what is asked now
            self.agree(args)
        self.on_save(args, state, control)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @staticmethod
    def stop(number, args, state):
        name = signal.Signals(number).name
        raise Fault(f"stopped by {name} at step {state.global_step}: {where_to_resume(args)}", 128 + number)


class Gradients(TrainerCallback):
    """Gradients give their memory back after each step; in half precision, by default, they are used in float32.

    In float16 what is small would vanish when it is unscaled, and a squared norm past 65504 overflow, so that clipping
    makes the update zero.
    """

    def __init__(self, master):
        self.master = master  # whether they become float32 before they are unscaled, clipped and used

    def on_optimizer_begin(self, args, state, control, model=None, **kwargs):
        if self.master:
            # What paddle.amp.decorate(master_grad=True) does after a backward pass, of which recompute has many.
            paddle.base.core.eager.set_master_grads([p for p in model.parameters() if p.grad is not None])

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for weight in model.parameters():  # the Trainer has only filled them with zeros
            weight.clear_gradient(False)


class CheckFinite(TrainerCallback):
    """A loss or a weight that is no number ends the run before anything is logged, evaluated or saved after it.

    Where gradients are scaled (fp16), the GradScaler leaves out the update of such a step, as of one whose gradients
    overflow: the run then ends after MOST_SKIPPED losses in a row that are no numbers.
    """

    def __init__(self):
        self.skipped = self.in_a_row = 0  # steps without an update, since training began or was resumed
        self.last_loss = paddle.zeros([])
        self.forget()

    def forget(self):
        self.first_bad_step = paddle.full([], NEVER, dtype="int64")

    def note(self, loss, step):
        """Remember the first ``step`` whose ``loss`` is no number, on the device, where nothing waits for it.

        Returns the loss, or the last that was a number, for with it all that is logged afterwards would be none.
        """
        finite = paddle.isfinite(loss)
        self.first_bad_step = paddle.minimum(self.first_bad_step, paddle.where(finite, NEVER, step).reshape([]))
        self.last_loss = paddle.where(finite, loss, self.last_loss.astype(loss.dtype))
        return self.last_loss

    def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        self.rate_step = lr_scheduler.last_epoch

    def on_optimizer_end(self, args, state, control, lr_scheduler=None, scaler=None, **kwargs):
        if scaler is None:
            return
        if lr_scheduler.last_epoch != self.rate_step:  # the Trainer steps the rate after an update alone
            self.in_a_row = 0
            return
        lr_scheduler.step()  # the rate depends on the step, and ends where it is to end, however many are left out
        self.skipped += 1
        bad = (self.first_bad_step != NEVER).astype("int64")
        if args.world_size > 1:  # of all, for they must end together
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.in_a_row = self.in_a_row + 1 if bad.item() else 0
        self.forget()
        if self.in_a_row == MOST_SKIPPED:
            where = f"in {MOST_SKIPPED} steps in a row, the last of them step {state.global_step + 1}"
            raise Fault(f"the loss is not finite {where}: {ADVICE}; {where_to_resume(args)}")

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if not (control.should_log or control.should_evaluate or control.should_save):
            return
        step = self.first_bad_step.item()
        if step != NEVER:
            raise Fault(f"the loss is not finite at step {step}: {ADVICE}; {where_to_resume(args)}")
        if control.should_save and not all(
            weight.stop_gradient or paddle.isfinite(weight).all().item() for weight in model.parameters()
        ):
            step = state.global_step
            raise Fault(f"the weights are not finite after step {step}: {ADVICE}; {where_to_resume(args)}")

    on_epoch_end = on_step_end


class WholeCheckpoints(TrainerCallback):
    """A checkpoint gets a last file that says that all the others are whole; old ones go when the new one has it.

    PaddleNLP removes old ones before the new one is whole, and on a single process none at all.
    """

    def __init__(self, limit):
        self.limit = limit  # save_total_limit
        self.folder = None  # the checkpoint that is being written

    def on_train_begin(self, args, state, control, **kwargs):
        args.load_best_model_at_end = False  # GLMTrainer.train does, from a checkpoint of any precision and layout

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            self.folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")  # as the Trainer calls it
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, CHECKPOINT_DONE))

    on_epoch_end = on_step_end

    def on_save(self, args, state, control, model=None, **kwargs):
        first = args.local_rank in (-1, 0)
        if first:
            self.make_state_readable()
        if args.world_size > 1:
            dist.barrier()  # all have written theirs
        mark = {
            "files": checksums(self.folder, {*os.listdir(self.folder)} - {CHECKPOINT_DONE}),
            "parameters": {weight.name: name for name, weight in model.state_dict().items()},
            "records": args.records_a_step,
        }
        if first:
            write_whole(os.path.join(self.folder, CHECKPOINT_DONE), json.dumps(mark))
            self.remove_old_ones(args, state)
        if args.world_size > 1:
            dist.barrier()  # who says where to go on has to find the mark
        self.folder = None

    def make_state_readable(self):
        """Take out of the trainer's state what PaddleNLP 3 adds and PaddleNLP 2 refuses; neither needs it here."""
        path = os.path.join(self.folder, "trainer_state.json")
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        if state.pop("consumed_samples", None) is not None:
            with open(path, "w", encoding="utf-8") as file:
                json.dump(state, file, indent=2, sort_keys=True)

    def remove_old_ones(self, args, state):
        checkpoints = glob.glob(os.path.join(glob.escape(args.output_dir), "checkpoint-*[0-9]"))
        kept = {self.folder, state.best_model_checkpoint or self.folder}
        old = sorted((path for path in checkpoints if path not in kept), key=os.path.getmtime)
        count = len(checkpoints) - max(self.limit or len(checkpoints), len(kept))
        for path in old[: max(count, 0)]:
            shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- trainer


class GLMTrainer(Trainer):
    """PaddleNLP's Trainer with the label-smoothed loss, the decaying schedule and evaluation by beam search.

    Args (beside the Trainer's):
        generation (GenerationArguments): how evaluation generates.
        label_smoothing (float): e of LabelSmoothedLoss.
        lr_decay_ratio (float): the share of the peak rate that a linear schedule ends at.
        memory (dict): the bytes that "train" and "eval" are estimated to take, for the results.
    """

    def __init__(self, *, args, generation, label_smoothing, lr_decay_ratio, memory=None, **kwargs):
        # The Trainer's own way leaves main gradients unscaled on one process, and removes checkpoints too early.
        master_grad, args.amp_master_grad = args.amp_master_grad, False
        save_total_limit, args.save_total_limit = args.save_total_limit, None
        super().__init__(args=args, **kwargs)
        self.generation, self.label_smoothing, self.lr_decay_ratio = generation, label_smoothing, lr_decay_ratio
        prepare_for_training(self.model)
        self.tensor_parallel_group = None
        if self.args.tensor_parallel_degree > 1:
            self.tensor_parallel_group = fleet.get_hybrid_communicate_group().get_model_parallel_group()
        for callback in (ProgressCallback, PrinterCallback):
            self.pop_callback(callback)
        self.check_finite, self.checkpoints = CheckFinite(), WholeCheckpoints(save_total_limit)
        # In this order: what is not finite is not saved, and a signal ends the run when its checkpoint is whole.
        self.stop_by_signal = StopBySignal()
        gradients = Gradients(master_grad)
        if self.args.early_stopping_patience:
            self.add_callback(EarlyStoppingCallback(self.args.early_stopping_patience))
        for callback in (
            TrainingProgress, SeedEachStep, gradients, self.check_finite, self.checkpoints, self.stop_by_signal,
        ):  # fmt: skip
            self.add_callback(callback)
        self.evaluated, self.rows = None, []  # the metrics of the weights as they are; the last predictions
        self.memory = memory or {}
        self.train_memory_peak = self.train_tokens = 0  # bytes; of the global batches, without padding

    def target_losses(self, model, inputs):
        return target_losses(self.model, model, inputs, self.label_smoothing, self.tensor_parallel_group)

    # training

    def compute_loss(self, model, inputs, return_outputs=False):
        """The mean over the batch's target tokens, the end token included.

        In training the batch is the global one: this process's share of the sum, times the processes and passes that
        gradients are averaged over afterwards, over the number of its target tokens, which every process knows.
        """
        losses = self.target_losses(model, inputs)
        share = 1 / len(losses)
        if self.is_in_train:
            target_tokens = self.train_sampler.target_tokens
            tokens = int(target_tokens[self.state.global_step % len(target_tokens)])
            share = self.args.dataset_world_size * self.args.gradient_accumulation_steps / tokens
        loss = losses.sum() * share
        return (loss, losses) if return_outputs else loss

    def training_step(self, *args, **kwargs):
        """The Trainer's, with its loss noted."""
        self.evaluated, step = None, self.state.global_step
        loss = self.check_finite.note(super().training_step(*args, **kwargs), step + 1)
        tokens = self.train_sampler.tokens
        self.train_tokens += tokens[step % len(tokens)] / self.args.gradient_accumulation_steps
        return loss

    def train(self, resume_from_checkpoint=None, **kwargs):
        """The Trainer's. A run that had come to its end is only loaded, for the Trainer would go one step further."""
        first_step, best_at_end = 0, self.args.load_best_model_at_end
        if resume_from_checkpoint:
            with self.loading(resume_from_checkpoint):
                state = TrainerState.load_from_json(os.path.join(resume_from_checkpoint, "trainer_state.json"))
            first_step = state.global_step
            steps_an_epoch = len(self._get_train_sampler()) // self.args.gradient_accumulation_steps
            last_step = self.args.max_steps if self.args.max_steps > 0 else steps_an_epoch * self.args.num_train_epochs
            if first_step >= int(last_step):
                best = state.best_model_checkpoint if best_at_end else None
                with self.loading(best or resume_from_checkpoint):
                    self._load_from_checkpoint(best or resume_from_checkpoint)
                self.state = state
                return TrainOutput(first_step, None, {})
        memory_peak(reset=True)
        try:
            with self.loading(resume_from_checkpoint):
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except OSError as error:
            folder = self.checkpoints.folder
            if folder is None or self.control.should_evaluate:  # it was not the checkpoint that failed
                raise
            shutil.rmtree(folder, ignore_errors=True)
            resume = where_to_resume(self.args)
            raise Fault(f"{folder} can't be written: {error.strerror or error}; {resume}") from error
        self.args.load_best_model_at_end = best_at_end
        best = self.state.best_model_checkpoint if best_at_end else None
        if best and os.path.basename(best) != f"checkpoint-{self.state.global_step}":
            self._load_from_checkpoint(best)
            self.evaluated = None
        # The Trainer divides what it summed up since it resumed by the steps of the whole run.
        output.metrics["train_loss"] *= output.global_step / (output.global_step - first_step)
        output.metrics["train_skipped_steps"] = self.check_finite.skipped
        output.metrics["train_tokens_per_second"] = round(self.train_tokens / output.metrics["train_runtime"], 2)
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        output.metrics.update(self.memory_metrics("train", self.train_memory_peak))
        return output

    def memory_metrics(self, kind, peak):
        """The estimate for ``kind``, train or eval, and the ``peak`` in bytes or None: GB, of the largest process."""
        peak = max((peak for peak in of_all(peak) if peak is not None), default=None)
        numbers = {"estimated": self.memory.get(kind), "peak": peak}
        return {f"{kind}_memory_{name}_gb": number and round(number / 1e9, 3) for name, number in numbers.items()}

    @contextlib.contextmanager
    def finishing(self):
        """What is saved in output_dir within is written beside it first: each file is whole, or as it was."""
        args, folder, final = self.args, os.path.join(self.args.output_dir, UNFINISHED), self.args.output_dir
        if args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder)
            with contextlib.suppress(FileNotFoundError):  # to which results are added
                shutil.copy(os.path.join(final, "all_results.json"), folder)
        if args.world_size > 1:
            dist.barrier()
        args.output_dir = folder
        try:
            yield
        except OSError:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            args.output_dir = final
        if args.world_size > 1:
            dist.barrier()
        if args.process_index == 0:
            for name in os.listdir(folder):
                os.replace(os.path.join(folder, name), os.path.join(final, name))
            os.rmdir(folder)

    def save_merged(self):
        """Write the whole model with the adapter in its weights, which stays in them."""
        model = merge_lora(self.model)
        self.evaluated = None
        if self.args.should_save:
            self.tokenizer.save_pretrained(self.args.output_dir)
        if self.args.should_save_model_state:
            model.save_pretrained(
                self.args.output_dir, merge_tensor_parallel=self.args.tensor_parallel_degree > 1,
                variant=self.args.weight_name_suffix, is_main_process=self.args.should_save, max_shard_size="1024GB",
            )  # fmt: skip

    def log(self, logs, **kwargs):
        """The Trainer's, which in PaddleNLP 3 empties the history that trainer_state.json and a resumed run hold."""
        history, self.state.log_history = self.state.log_history, []
        super().log(logs, **kwargs)
        history.append({**logs, "step": self.state.global_step})
        self.state.log_history = history

    @contextlib.contextmanager
    def loading(self, checkpoint):
        """Tell a damaged checkpoint from a bug: what PaddleNLP raises before training begins is an InputError."""
        try:
            yield
        except Exception as error:
            if checkpoint is None or self.stop_by_signal.previous is not None:  # training has begun
                raise
            text = str(error)[:200] or type(error).__name__
            raise InputError(
                f"{checkpoint} can't be loaded ({text}): remove it to go on from the checkpoint before it"
            ) from error

    def create_scheduler(self, num_training_steps):
        """linear: from 0 up to learning_rate, then straight down to lr_decay_ratio of it at the last step."""
        if self.args.lr_scheduler_type != SchedulerType.LINEAR or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps)
        warmup = self.args.warmup_steps or int(self.args.warmup_ratio * num_training_steps)
        decay = max(num_training_steps - 1 - warmup, 1)  # steps from the peak to the last one

        def factor(step):
            if step < warmup:
                return step / warmup
            return 1 - (1 - self.lr_decay_ratio) * min((step - warmup) / decay, 1)

        self.lr_scheduler = paddle.optimizer.lr.LambdaDecay(self.args.learning_rate, factor)
        return self.lr_scheduler

    # evaluation

    def evaluate(self, *args, **kwargs):
        """The Trainer's; weights that were evaluated already keep their results."""
        if self.evaluated is None:
            self.evaluated = super().evaluate(*args, **kwargs)
        return self.evaluated

    def prediction_step(self, model, inputs, prediction_loss_only=None, ignore_keys=None):
        """Beam search and loss of one batch; ``evaluation_loop`` takes them from ``self.outputs``."""
        inputs = self._prepare_inputs(inputs)
        source_length = inputs["source_length"].numpy()
        input_ids = inputs["input_ids"][:, : source_length.max()]
        start_token_id, end_token_id = self.tokenizer.sop_token_id, self.tokenizer.eop_token_id
        # Without autocast, which would cast every weight and the whole cache again at each token.
        with paddle.no_grad():
            hypotheses = beam_search(
                model, input_ids, source_length, self.generation, start_token_id, end_token_id,
                group=self.tensor_parallel_group,
            )  # fmt: skip
            losses = self.target_losses(model, inputs).numpy() if len(inputs["labels"]) else np.zeros(0)
        # The targets of a record stand side by side in the flattened batch, records in order.
        rows = inputs["target_positions"].numpy() // inputs["input_ids"].shape[1]
        for row, (index, best) in enumerate(zip(inputs["index"].tolist(), hypotheses)):
            self.outputs[index] = {"hypotheses": best, "losses": losses[rows == row]}
        self.generated_tokens += sum(len(best[0][0]) for best in hypotheses)
        self.bar.update(len(hypotheses))
        self.bar.set_postfix_str(f"{self.generated_tokens / (time.time() - self.start):.1f} tokens/s")
        return None, None, None

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        """The Trainer's loop, then the metrics and ``{eval,test}_predictions.jsonl``, in the input's order."""
        self.train_memory_peak = max(self.train_memory_peak, memory_peak())
        memory_before = memory_peak(reset=True)
        self.outputs = {}  # by the record's number: batches may repeat a record
        self.generated_tokens, self.start = 0, time.time()
        disable = self.args.disable_tqdm or not self.is_world_process_zero()
        records = len(dataloader.dataset) // self.args.dataset_world_size
        with tqdm(
            total=records, desc=metric_key_prefix, unit="record", leave=False, disable=disable, dynamic_ncols=True
        ) as self.bar:
            output = super().evaluation_loop(
                dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
        parts = of_all(self.outputs)
        self.outputs = {index: result for part in parts for index, result in part.items()}
        seconds = time.time() - self.start
        generated_tokens = sum(len(result["hypotheses"][0][0]) for result in self.outputs.values())

        rows = []
        for index, result in sorted(self.outputs.items()):
            record, candidates = dataloader.dataset[index]["record"], self.generation.num_return_sequences > 1
            rows.append(prediction_row(self.tokenizer, record, result["hypotheses"], candidates))
        metrics = {"samples": len(rows), "tokens_per_second": round(generated_tokens / seconds, 2)}
        scored = [row for row in rows if row["reference"] is not None]
        if scored:
            metrics["loss"] = float(np.concatenate([result["losses"] for result in self.outputs.values()]).mean())
            metrics.update(compute_metrics(*([row[key] for row in scored] for key in ("prediction", "reference"))))
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        memory = memory_peak()
        if self.args.do_train and memory == memory_before:
            memory = None  # training took more, and Paddle 2 can't begin anew
        memory = self.memory_metrics("eval", memory)
        output.metrics.update({name.replace("eval", metric_key_prefix, 1): value for name, value in memory.items()})
        if self.is_world_process_zero():
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            logger.eval(f"{metric_key_prefix} at step {self.state.global_step}: {numbers}")
        self.rows = rows
        if self.args.should_save:
            os.makedirs(self.args.output_dir, exist_ok=True)
            path = os.path.join(self.args.output_dir, f"{metric_key_prefix}_predictions.jsonl")
            write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return output

    # What follows overrides private methods of PaddleNLP's Trainer, which its next release may rename.

    # Its samplers shuffle otherwise on one process than on several, and don't group by length. The public way round
    # them, get_train_dataloader and get_eval_dataloader, would be a copy of both.
    def _get_train_sampler(self):
        args = self.args
        replicas, accumulation = args.dataset_world_size, args.gradient_accumulation_steps
        batch_size = args.per_device_train_batch_size
        self.train_sampler = GroupedBatchSampler(
            self.train_dataset, batch_size, replicas, args.dataset_rank, batch_size * replicas * accumulation,
            shuffle=True, group_by_length=args.group_by_length, seed=args.seed,
        )  # fmt: skip
        return self.train_sampler

    def _get_eval_sampler(self, eval_dataset):
        """From long to short, so that a batch has little padding; none of more records than there are."""
        args, batch_size = self.args, self.args.per_device_eval_batch_size
        batch_size = min(batch_size, -(-len(eval_dataset) // args.dataset_world_size))
        return GroupedBatchSampler(
            eval_dataset, batch_size, args.dataset_world_size, args.dataset_rank, batch_size * args.dataset_world_size,
            shuffle=False, group_by_length=True, seed=args.seed,
        )  # fmt: skip

    # A checkpoint may be of another precision and layout than this run. Theirs know the layout at hand alone.
    def _load_from_checkpoint(self, checkpoint=None):
        if checkpoint is not None:
            self.model.set_state_dict(cast_weights(read_weights(checkpoint, self.model), self.model))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self.args.ignore_load_lr_and_optim:
            return
        # multi_precision: O2 trains float32 master weights of the half-precision ones.
        master_weights = self.args.fp16_opt_level == "O2" and (self.args.fp16 or self.args.bf16)
        names = read_mark(checkpoint).get("parameters")
        state = read_optimizer_state(checkpoint, self.optimizer, self.model, names, master_weights)
        self.optimizer.set_state_dict(state)
        self.lr_scheduler.set_state_dict(paddle.load(os.path.join(checkpoint, "scheduler.pdparams")))
        scaler = os.path.join(checkpoint, "scaler.pdparams")
        if self.do_grad_scaling and os.path.isfile(scaler):
            self.scaler.load_state_dict(paddle.load(scaler, return_numpy=True))

    # The Trainer's fails where the GPU build runs on a CPU, and SeedEachStep needs no state.
    def _load_rng_state(self, checkpoint):
        """Nothing to load."""
