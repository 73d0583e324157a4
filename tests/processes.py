"""Runs a function in processes that are forked off this one: they need not import anything again."""

import os
import socket
import sys
import traceback


def forked(function, *arguments, count=1):
    """Exit codes of some processes, negative for a signal; several talk to each other as torch's launcher has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _run(function, arguments, rank, count, port)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def _run(function, arguments, rank, count, port):
    """Runs it in the child, which ends here."""
    code = 1
    try:
        if count > 1:
            from accelerate.state import AcceleratorState, GradientState, PartialState

            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            os.environ.update({name: str(value) for name, value in world.items()})
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
        function(*arguments)
        if count > 1:
            import torch.distributed

            if torch.distributed.is_initialized():  # else one that is done early ends what another still connects to
                torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
