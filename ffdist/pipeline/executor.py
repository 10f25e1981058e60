"""Executors: how the minibatches of a chunk are run on a device.

On a CPU, one after the other. On a GPU, as CUDA graphs, while the inputs of the next ones are copied there.
"""

import gc
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_GRAPHS = 4
"""Number of graphs to keep: learning rates change from epoch to epoch, and some minibatches are measured."""


class StepMode(NamedTuple):
    """How a minibatch is trained on. Its values are constants of a captured graph."""

    lr_scale: float
    """Factor of the schedule on the learning rates."""
    layer: int | None = None
    """The only layer that is trained; None for all."""
    measure: bool = False
    """Whether to measure MEASURED."""


Step = Callable[[Sequence[Tensor], StepMode], Sequence[Tensor]]
"""Trains on the inputs of a minibatch, on the device of the weights, and returns tensors there."""
Executor = Callable[[Step, Sequence[Tensor], Sequence[StepMode]], list[Tensor]]
"""Runs the steps of a chunk, as `run_sequentially` does. The step is an argument of the call: an executor that kept it
would make a reference cycle with its stage, and GPU memory would wait for the garbage collector."""
Captured = tuple[torch.cuda.CUDAGraph, Sequence[Tensor], Sequence[Tensor]]
"""A graph, its inputs and its outputs."""


def make_executor(device: str, *, inputs_on_device: bool = False) -> Executor:
    """Returns the executor of a device; arguments are those of `OverlappedExecutor`."""
    return run_sequentially if device == "cpu" else OverlappedExecutor(device, inputs_on_device=inputs_on_device)


def run_sequentially(step: Step, inputs: Sequence[Tensor], modes: Sequence[StepMode]) -> list[Tensor]:
    """Runs steps one after the other.

    Args:
        step: Trains on a minibatch.
        inputs: Inputs of all minibatches `[K, ...]` each.
        modes: Mode of each minibatch.

    Returns:
        Each output of the step, of all minibatches `[K, ...]`, in host memory.
    """
    outputs = [step(minibatch, mode) for *minibatch, mode in zip(*inputs, modes, strict=True)]
    return [torch.stack(output) for output in zip(*outputs, strict=True)]


class CudaGraphs:
    """Runs steps as CUDA graphs: a single launch for any number of kernels. On other devices, runs them directly.

    The first step of each mode is run directly, because some libraries must not be initialized during a capture.
    """

    def __init__(self) -> None:
        self._captured: dict[StepMode, Captured | None] = {}

    def __call__(self, step: Step, inputs: Sequence[Tensor], mode: StepMode) -> Sequence[Tensor]:
        """Runs a step, which must be the same at every call and must not wait for the device.

        Returns:
            Its outputs, which the next call may overwrite.
        """
        if inputs[0].device.type != "cuda":
            return step(inputs, mode)
        if mode not in self._captured:
            if len(self._captured) == MAX_GRAPHS:
                torch.cuda.synchronize()
                self._captured.clear()  # those of earlier epochs, and the memory that they hold
            self._captured[mode] = None
            return step(inputs, mode)
        graph, graph_inputs, outputs = self._captured[mode] or self._capture(step, inputs, mode)
        for graph_input, tensor in zip(graph_inputs, inputs, strict=True):
            graph_input.copy_(tensor)
        graph.replay()
        return outputs

    def _capture(self, step: Step, inputs: Sequence[Tensor], mode: StepMode) -> Captured:
        graph, graph_inputs, collects = torch.cuda.CUDAGraph(), [tensor.clone() for tensor in inputs], gc.isenabled()
        gc.disable()  # garbage may hold other graphs, and freeing one would invalidate the capture
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
                captured = self._captured[mode] = graph, graph_inputs, step(graph_inputs, mode)
        finally:
            if collects:
                gc.enable()
        return captured


class OverlappedExecutor:
    """Runs steps on a GPU while the inputs of the next ones are copied there on another stream.

    Args:
        device: The device, as torch names it.
        inputs_on_device: Whether inputs are on the device already, because they were made there.
    """

    def __init__(self, device: str, *, inputs_on_device: bool) -> None:
        self._device, self._inputs_on_device, self._is_cuda = device, inputs_on_device, device.startswith("cuda")
        self._device_module = torch.get_device_module(device)
        self._copy_stream, self._graphs = self._device_module.Stream(), CudaGraphs()

    def __call__(self, step: Step, inputs: Sequence[Tensor], modes: Sequence[StepMode]) -> list[Tensor]:
        """Takes and returns what `run_sequentially` does."""
        results = list[Tensor]()
        minibatches = zip(*inputs, strict=True) if self._inputs_on_device else self._copied(inputs)
        for number, (minibatch, mode) in enumerate(zip(minibatches, modes, strict=True)):
            outputs = self._graphs(step, minibatch, mode)
            results = results or [output.new_empty((len(modes), *output.shape)) for output in outputs]
            for result, output in zip(results, outputs, strict=True):
                result[number].copy_(output)
        in_host_memory = [result.to("cpu", non_blocking=True) for result in results]
        self._device_module.synchronize()
        return in_host_memory

    def _copied(self, inputs: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
        """Yields the inputs of each minibatch on the device; work that is launched after that waits for the copy."""
        # Buffers last for the chunk: memory that is freed for one stream may still be in use by another.
        pinned = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self._is_cuda) for tensor in inputs]
        on_device = [torch.empty_like(tensor, device=self._device) for tensor in inputs]
        self._copy_stream.wait_stream(self._device_module.current_stream())
        for number in range(len(inputs[0])):
            for buffer, tensor in zip(pinned, inputs, strict=True):
                buffer[number].copy_(tensor[number])  # a GPU copies asynchronously from pinned memory only
            with self._device_module.stream(self._copy_stream):
                for target, buffer in zip(on_device, pinned, strict=True):
                    target[number].copy_(buffer[number], non_blocking=True)
            self._device_module.current_stream().wait_event(self._copy_stream.record_event())
            yield [target[number] for target in on_device]
