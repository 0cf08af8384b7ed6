"""The package inside SGLang itself, on a CPU: `python tests/integrations/in_sglang/sglang_itself.py FOLDER`.

Small converted weights go through SGLang's own registry, loader, causal stage, `sglang generate` and `sglang serve`,
and the latents are compared with ours. No weights are downloaded. SGLang and mlaconvert are all that has to be
installed, as docs/integrations/sglang.md says; that brings CUDA, and runs without a GPU all the same.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

HERE = Path(__file__).parent
PACKAGE = "mlaconvert.integrations.sglang"


def say(*lines: str) -> None:
    sys.stdout.write("".join(f"{line}\n" for line in lines))


def stage_for(folder: Path, precision: str) -> tuple[Any, Any]:
    """SGLang's registry, loader and causal stage around the folder, and the arguments of its server."""
    from sglang.multimodal_gen.registry import get_pipeline_class, get_pipeline_config_classes
    from sglang.multimodal_gen.runtime.server_args import ServerArgs, set_global_server_args

    pipeline, classes = get_pipeline_class("WanMLAPipeline"), get_pipeline_config_classes("WanMLAPipeline")
    assert pipeline is not None
    assert classes is not None
    assert pipeline.__module__.startswith(PACKAGE), "SGLANG_EXTERNAL_MODEL_PACKAGE was not loaded"
    arguments = ServerArgs(model_path=str(folder.parent / "base"), pipeline_config=classes[0](dit_precision=precision))
    set_global_server_args(arguments)
    transformer, _ = pipeline.component_loaders["transformer"]().load(
        str(folder), arguments, "transformer", "diffusers"
    )

    from mlaconvert.integrations.sglang.pipeline import LatentCausalDenoisingStage, SelfForcingFlowMatchScheduler

    scheduler = SelfForcingFlowMatchScheduler(num_inference_steps=1000, shift=5.0, sigma_min=0.0, extra_one_step=True)
    return LatentCausalDenoisingStage(transformer, scheduler), arguments


def compare(folder: Path) -> None:
    """Two requests in float32, one in the other's memory, and two of unequal sizes in bfloat16."""
    from sglang_cases import CACHE_BYTES, SHIPPED, expected, request
    from support import relative

    stage, arguments = stage_for(folder, "fp32")
    for seed in (3, 4):
        found = stage.forward(request(seed), arguments).latents
        difference = relative(found, expected(folder, request(seed)))
        assert difference < 1e-5, difference
    say(f"both requests are ours: latents differ by {difference:.1g}")
    for precision, size in (("fp32", 4), ("bf16", 2)):
        stage, arguments = stage_for(folder, precision)
        stage.forward(request(5), arguments)
        held = sum(layer.nbytes for layer in stage.causal_kv_cache)
        assert held == CACHE_BYTES[size], held
        say(f"its cache holds {held:,} bytes in {precision}, as analyze plans")
    stage.forward(request(5, width=14), arguments)  # another size

    from mlaconvert import ConvertRecipe, convert

    shipped = folder.parent / "tiny-mla"
    convert("tiny", shipped, ConvertRecipe(init="svd"))
    stage, arguments = stage_for(shipped, "fp32")
    found = stage.forward(request(9, **SHIPPED), arguments).latents
    difference = relative(found, expected(shipped, request(9, **SHIPPED)))
    assert difference < 1e-5, difference
    say(f"and so is one to the built-in model: latents differ by {difference:.1g}")


def command(verb: str, *options: str) -> list[str]:
    call = "from sglang.cli.main import main; main()"
    return [sys.executable, "-c", call, verb, "--pipeline-class-name", "WanMLAPipeline", *options]


def generate(folder: Path, output: Path) -> None:
    """`sglang generate`, its own processes and all, from a converted folder that knows its base."""
    options = ["--height", "48", "--width", "80", "--num-frames", "33", "--prompt", "a cat walks slowly"]
    line = command("generate", "--model-path", str(folder), *options, "--output-path", str(output))
    done = subprocess.run(line, check=False, capture_output=True, text=True)
    said = (done.stdout + done.stderr).splitlines()
    assert done.returncode == 0, "\n".join(said[-40:])
    say(*(line for line in said if "latent KV cache" in line))
    (film,) = output.glob("*.mp4")
    say(f"sglang generate wrote {film.stat().st_size:,} bytes of video")


def serve(base: Path, folder: Path, output: Path) -> None:
    """`sglang serve` with two replicas, and a video from each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--num-gpus", "2", "--dp-size", "2", "--port", str(port), "--output-path", str(output)]
    line = command("serve", "--model-path", str(base), "--transformer-path", str(folder), *options)
    output.mkdir()
    with (output / "log").open("w") as log, subprocess.Popen(line, stdout=log, stderr=log, cwd=output) as server:
        try:
            wait(lambda: ask(port, "health") is not None, server, "start")
            wanted = {"size": "80x48", "num_frames": 33}
            made = [ask(port, "v1/videos", {"prompt": f"a {animal} walks"} | wanted) for animal in ("cat", "dog")]
            assert None not in made, (output / "log").read_text()[-3000:]

            def finished() -> bool:
                return all(
                    video["status"] == "completed" for video in (ask(port, "v1/videos") or {"data": [{}]})["data"]
                )

            wait(finished, server, "make two videos")
        finally:
            server.terminate()
    say("sglang serve made two videos with two replicas")


def ask(port: int, path: str, body: dict[str, Any] | None = None) -> Any:
    """What the server answers; None where it does not."""
    data = None if body is None else json.dumps(body).encode()
    asked = Request(f"http://127.0.0.1:{port}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urlopen(asked, timeout=30) as answer:
            return json.loads(answer.read() or b"{}")
    except OSError:
        return None


def wait(done: Callable[[], bool], server: subprocess.Popen[bytes], what: str) -> None:
    for _ in range(300):
        if done():
            return
        assert server.poll() is None, f"the server ended before it could {what}"
        time.sleep(1)
    raise AssertionError(f"the server did not {what}")


def main() -> None:
    root = Path(sys.argv[1]).resolve()
    root.mkdir(parents=True, exist_ok=True)
    places = [str(HERE), str(HERE.parents[1]), str(HERE.parents[2])]
    if os.environ.get("SGLANG_EXTERNAL_MODEL_PACKAGE") != PACKAGE:  # once more, as a user has it exported
        path = os.pathsep.join([*places, os.environ.get("PYTHONPATH", "")])
        os.environ |= {"SGLANG_EXTERNAL_MODEL_PACKAGE": PACKAGE, "PYTHONPATH": path}
        os.execv(sys.executable, [sys.executable, __file__, str(root)])

    from sglang_cases import make_base, make_converted

    base = make_base(root / "base")
    folder = make_converted(root / "converted", base)
    compare(folder)
    generate(folder, root / "videos")
    serve(base, folder, root / "served")


if __name__ == "__main__":
    main()
