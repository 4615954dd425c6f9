"""`python -m fathom VERB ...`, the same as `fathom VERB ...`."""

import signal

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        # Ctrl-C before the command line is there to say so in one line.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    from .scripts.cli import entry_point

    entry_point()
