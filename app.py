"""flags and environment -> a page on http://127.0.0.1:7860: the one command to start, also the entry of a Space."""

import argparse
import logging
import os
import signal
import sys
import tempfile


def main() -> None:
    """Load the engine, build the page and serve it until Ctrl+C."""
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dalle_demo").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does, with the pictures deleted
    with tempfile.TemporaryDirectory(prefix="dalle_demo-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # not the /tmp/gradio that everyone on the machine can read
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        serve(args)


def parse_args() -> argparse.Namespace:
    """Flags; weights can also come from the environment, address and port as for any gradio app."""
    parser = argparse.ArgumentParser(description="Serve the text-to-image page.")
    preset = os.environ.get("DALLE_DEMO_WEIGHTS", "nano")
    parser.add_argument("--weights", default=preset, metavar="PRESET_OR_FOLDER", help="default: %(default)s")
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME or 127.0.0.1)")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT or the first free one from 7860")
    return parser.parse_args()


def serve(args: argparse.Namespace) -> None:
    """Print where the page is, and serve it; a problem with the weights is one sentence and exit code 2."""
    from dalle_demo import DalleEngine, WeightsError

    try:
        engine = DalleEngine.load(args.weights)
    except WeightsError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    from dalle_demo.ui.app import build  # brings gradio, seconds that a wrong folder need not wait for

    page, options = build(engine)
    options |= {"server_name": args.host, "server_port": args.port}
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **options)
    print(f"{engine.name} is served at {url}", flush=True)
    page.block_thread()


if __name__ == "__main__":
    main()
