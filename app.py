"""flags and environment -> a page on http://127.0.0.1:7860: the one command to start, also the entry of a Space."""

import argparse
import logging
import os
import signal
import sys
import tempfile
from functools import partial


def main() -> None:
    """Load the engine, build the page and serve it until Ctrl+C."""
    args = parse_args()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("dalle_demo").setLevel(logging.INFO)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as Ctrl+C does, with the pictures deleted
    parent = os.environ.get("GRADIO_TEMP_DIR")
    if parent and not os.path.isdir(parent):
        sys.exit(f"GRADIO_TEMP_DIR names {parent}, which is no folder")
    with tempfile.TemporaryDirectory(prefix="dalle_demo-", dir=parent, ignore_cleanup_errors=True) as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # not the /tmp/gradio that everyone on the machine can read
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        try:
            serve(args)
        except (ValueError, OSError, MemoryError, RuntimeError) as error:  # weights, a taken port, a graphics card
            print(str(error) or "there is not enough memory", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt as stop:
            if stop.args:  # of a download, which has something to say
                print(stop, file=sys.stderr)
                sys.exit(2)
            sys.exit(0)


def parse_args() -> argparse.Namespace:
    """Flags; weights can also come from the environment, address and port as for any gradio app."""
    parser = argparse.ArgumentParser(description="Serve the text-to-image page.")
    preset = os.environ.get("DALLE_DEMO_WEIGHTS", "nano")
    what = "preset, folder, or user/name on the Hugging Face Hub; fetched if it is not here (default: %(default)s)"
    parser.add_argument("--weights", default=preset, metavar="FOLDER_OR_REPO", help=what)
    parser.add_argument("--device", help="cpu, cuda or mps (default: a graphics card if there is one)")
    parser.add_argument("--host", help="address to listen on (default: GRADIO_SERVER_NAME or 127.0.0.1)")
    given = os.environ.get("GRADIO_SERVER_PORT")
    what = "default: GRADIO_SERVER_PORT or the first free one from 7860"
    parser.add_argument("--port", type=port, default=given, help=what)
    return parser.parse_args()


def port(text: str) -> int:
    """Number of a port."""
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 65535, not {text}")
    return int(text)


def serve(args: argparse.Namespace) -> None:
    """Serve the page and print where it is."""
    from dalle_demo import DalleEngine
    from dalle_demo.__main__ import ensure
    from dalle_demo.shelf import Shelf
    from dalle_demo.weights import is_unclip

    given = ensure(args.weights)
    what = "unclip" if is_unclip(given) else "preset"
    shelf = Shelf(offline=is_offline(), load=partial(DalleEngine.load, device=args.device), **{what: given})
    from dalle_demo.ui.app import build  # brings gradio, seconds that a wrong folder need not wait for

    page, options = build(shelf)
    options |= {"server_name": args.host, "server_port": args.port}
    try:
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **options)
    except OSError as error:  # whose sentence tells how to call gradio
        where = f"port {args.port or 'from 7860 to 7959'}" + (f" of {args.host}" if args.host else "")
        advice = "give another --port" + (", or a --host that this computer has" if args.host else "")
        raise OSError(f"cannot listen on {where}, which another program may have: {advice}") from error
    print(f"{shelf.home if what == 'preset' else shelf.unclip_home} is served at {url}", flush=True)
    shelf.models()  # measures what the first visitor would otherwise wait for
    page.block_thread()


def is_offline() -> bool:
    """Whether the environment keeps programs off the Hugging Face Hub; models that are not here are not shown then."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


if __name__ == "__main__":
    main()
