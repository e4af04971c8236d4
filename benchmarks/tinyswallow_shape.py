"""How a model of TinySwallow's size exports and runs here: random weights in the true shape of Qwen2.5-1.5B.

Speed and memory only: nothing that such a model says means anything. The tokenizer is SmolLM2's; the rows of
the embedding that it does not reach are padding. Exports run in a process of their own, whose memory and that
of its children is sampled; files are measured as the pipeline's benchmark measures them.
"""

import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import common
from pipeline.artifacts import write_json
from pipeline.exports import size_of

SEED = 0
SHAPE = {
    "hidden_size": 1536,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "intermediate_size": 8960,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
GGUF_BUDGET = 1.5 * 2**30
"""Bytes that a GGUF export may take."""
EXPORTS = {
    "gguf": (
        "from export.gguf import export_gguf; "
        "export_gguf(Path({model!r}), Path({output!r}), 'shape', {quantizations}, "
        "pre_tokenizer='qwen2', threads={threads})"
    ),
    "mlc": (
        "from export.mlc import export_mlc; "
        "export_mlc(Path({model!r}), Path({output!r}), 'shape', {quantizations}[0], context_length=4096)"
    ),
    "onnx": (
        "from export.onnx import export_onnx; "
        "export_onnx(Path({model!r}), Path({output!r}), 'shape', {quantizations}, threads={threads})"
    ),
}
QUANTIZATIONS = {"gguf": ["q8_0", "q4_k_m"], "mlc": ["q4f32_1"], "onnx": ["int4"]}


def write_checkpoint(folder: Path, tokenizer_folder: Path) -> int:
    """A Hugging Face folder of random bfloat16 weights, one file a layer.

    Returns:
        Its number of parameters, the tied head counted once.
    """
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, Qwen2Config

    generator = torch.Generator().manual_seed(SEED)
    config = Qwen2Config(
        **SHAPE,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        bos_token_id=None,
        eos_token_id=2,
        architectures=["Qwen2ForCausalLM"],
        dtype="bfloat16",
    )
    folder.mkdir(parents=True)
    count, total, files = SHAPE["num_hidden_layers"], 0, {}

    def random(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def save(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        total += sum(tensor.numel() for tensor in tensors.values())
        files.update(dict.fromkeys(tensors, name))
        save_file(tensors, folder / name, metadata={"format": "pt"})

    width, inner = SHAPE["hidden_size"], SHAPE["intermediate_size"]
    kv = width // SHAPE["num_attention_heads"] * SHAPE["num_key_value_heads"]
    names = [f"model-{number + 1:05d}-of-{count + 1:05d}.safetensors" for number in range(count + 1)]
    for number in range(count):
        prefix = f"model.layers.{number}."
        tensors = {
            f"{prefix}self_attn.{part}_proj.weight": random(rows, width)
            for part, rows in (("q", width), ("k", kv), ("v", kv), ("o", width))
        }
        tensors |= {
            f"{prefix}self_attn.{part}_proj.bias": random(rows)
            for part, rows in (("q", width), ("k", kv), ("v", kv))
        }
        tensors |= {f"{prefix}mlp.{part}_proj.weight": random(inner, width) for part in ("gate", "up")}
        tensors[f"{prefix}mlp.down_proj.weight"] = random(width, inner)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = torch.ones(width, dtype=torch.bfloat16)
        save(names[number], tensors)
    last = {
        "model.embed_tokens.weight": random(SHAPE["vocab_size"], width),
        "model.norm.weight": torch.ones(width, dtype=torch.bfloat16),
    }
    save(names[count], last)
    index = {"metadata": {"total_size": 2 * total}, "weight_map": files}
    write_json(folder / "model.safetensors.index.json", index)
    config.save_pretrained(folder)
    for pattern in ("tokenizer*.json", "chat_template.jinja", "generation_config.json"):
        for file in tokenizer_folder.glob(pattern):
            shutil.copy(file, folder / file.name)
    # As transformers reads it for a Qwen2, so that all formats have one tokenizer.
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return total


class Watch:
    """Samples the memory of this process's children: the sums over all that run at one time."""

    def __init__(self, process: int, every: float = 0.05):
        """
        Args:
            process: whose tree is watched.
            every: seconds between samples.
        """
        self.anonymous, self.resident = 0, 0
        self._every, self._stop = every, threading.Event()
        self._thread = threading.Thread(target=self._run, args=(psutil.Process(process),))
        self._thread.start()

    def _run(self, root: psutil.Process) -> None:
        while not self._stop.wait(self._every):
            anonymous = resident = 0
            try:
                tree = [root, *root.children(recursive=True)]
            except psutil.Error:
                continue
            for process in tree:
                try:
                    text = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
                except OSError:
                    continue
                values = dict(line.split(":", 1) for line in text.splitlines())
                anonymous += int(values.get("RssAnon", "0").split()[0]) * 1024
                resident += int(values.get("VmRSS", "0").split()[0]) * 1024
            self.anonymous, self.resident = max(self.anonymous, anonymous), max(self.resident, resident)

    def stop(self) -> None:
        """Ends the sampling."""
        self._stop.set()
        self._thread.join()


def export(format: str, model: Path, output: Path, threads: int) -> dict[str, Any]:
    """Exports in a process of its own.

    Returns:
        Seconds, CPU seconds (children included) and peaks of anonymous and of all resident memory.
    """
    call = EXPORTS[format].format(
        model=str(model), output=str(output), quantizations=QUANTIZATIONS[format], threads=threads
    )
    common.say(f"exporting {format}")
    began, before = time.perf_counter(), _children_cpu()
    process = subprocess.Popen([sys.executable, "-c", f"from pathlib import Path; {call}"])
    watch = Watch(process.pid)
    status = process.wait()
    watch.stop()
    if status != 0:
        raise RuntimeError(f"The export to {format} ended with status {status}.")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": _children_cpu() - before,
        "peak_anonymous_bytes": watch.anonymous,
        "peak_resident_bytes": watch.resident,
    }


def measured(file: Path, prompt: list[int], options: Any, work: Path) -> dict[str, Any]:
    """What ``pipeline.bench_worker`` says of a file, in a process of its own."""
    request = {
        "kind": "speed",
        "timeout_s": 3600,
        "file": str(file),
        "prompt": prompt,
        "generated_tokens": options.generated,
        "repetitions": options.rounds,
        "threads": options.threads,
    }
    write_json(work / "request.json", request)
    common.say(f"measuring {file.name}")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pipeline.bench_worker",
            str(work / "request.json"),
            str(work / "result.json"),
        ],
        check=True,
    )
    return json.loads((work / "result.json").read_text(encoding="utf-8"))


def _children_cpu() -> float:
    import resource

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Command line: ``python -m benchmarks.tinyswallow_shape``."""
    parser = common.arguments(__doc__.splitlines()[0], rounds=3)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--generated", type=int, default=24, help="tokens decoded in a round")
    parser.add_argument(
        "--formats",
        default="gguf,mlc",
        help="which to export, with commas; onnx, too, takes 16 GiB and a quarter of an hour",
    )
    parser.add_argument("--work", type=Path, help="folder of the models, about 12 GB; removed at the end")
    options = parser.parse_args()
    work = options.work or options.output / "tinyswallow-shape"
    shutil.rmtree(work, ignore_errors=True)
    teacher = common.teacher_folder(options.store)
    common.say("writing a random checkpoint")
    parameters = write_checkpoint(work / "model", teacher)
    prompt = common.prompt_ids(teacher, options.prompt)
    result: dict[str, Any] = {
        "note": "random weights: speed and memory only",
        "machine": common.machine(options.threads, ("llama-cpp-python", "apache-tvm", "onnxruntime-genai")),
        "seed": SEED,
        "shape": SHAPE,
        "parameters": parameters,
        "prompt_tokens": options.prompt,
        "generated_tokens": options.generated,
        "exports": {},
        "files": [],
    }
    for format in options.formats.split(","):
        output = work / format
        result["exports"][format] = export(format, work / "model", output, options.threads)
        for quantization in QUANTIZATIONS[format]:
            file = {
                "gguf": output / f"shape-{quantization}.gguf",
                "mlc": output,
                "onnx": output / "onnx" / "model_q4.onnx",
            }[format]
            speed = measured(file, prompt, options, work)
            entry = {"format": format, "quantization": quantization, "bytes": size_of(file), **speed}
            result["files"].append(entry)
        if format == "gguf":
            result["gguf_within_budget"] = result["exports"]["gguf"]["peak_anonymous_bytes"] <= GGUF_BUDGET
        shutil.rmtree(output)
        # After each format: the last takes longest and may run out of memory.
        common.write(options.output, "tinyswallow_shape", result)
    common.table(
        f"Exporting random weights in the shape of Qwen2.5-1.5B ({parameters / 1e9:.2f}e9 parameters)",
        ("format", "quantizations", "s", "CPU s", "peak anonymous GiB", "peak resident GiB"),
        [
            (
                format,
                " ".join(QUANTIZATIONS[format]),
                part["seconds"],
                part["cpu_seconds"],
                part["peak_anonymous_bytes"] / 2**30,
                part["peak_resident_bytes"] / 2**30,
            )
            for format, part in result["exports"].items()
        ],
    )
    common.table(
        f"Running them, {options.threads} thread, prompt of {options.prompt} (speed only: random weights)",
        (
            "file",
            "MB",
            "load s",
            "prefill tok/s",
            "decode tok/s",
            "CPU s/token",
            "anon MB",
            "peak MB",
            "read GB/s",
            "of bandwidth",
            "CPU pressure %",
        ),
        [
            (
                f"{each['format']} {each['quantization']}",
                each["bytes"] / 1e6,
                each["load_s"],
                each["prefill_tokens_per_s"],
                common.mean_and_deviation({"mean": each["decode_tokens_per_s"], "std": each["decode_std"]}),
                each["cpu_seconds_per_token"],
                each["rss_anon_bytes"] / 1e6,
                each["peak_rss_bytes"] / 1e6,
                each["memory_bytes_per_s"] / 1e9,
                f"{each['bandwidth_utilisation']:.0%}",
                each["cpu_pressure"],
            )
            for each in result["files"]
        ],
    )
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
