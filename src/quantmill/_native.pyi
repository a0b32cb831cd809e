import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]

def implementations() -> list[tuple[str, str, bool]]: ...
def best() -> str: ...
def quantize(
    weights: _Bytes,
    dtype: str,
    mode: str,
    bits: int,
    group_size: int,
    encode: float,
    codes: _Bytes,
    scales: _Bytes,
    biases: _Bytes,
    implementation: str,
) -> tuple[int, int]: ...
def dequantize(
    codes: _Bytes,
    scales: _Bytes,
    biases: _Bytes,
    dtype: str,
    mode: str,
    bits: int,
    group_size: int,
    values: _Bytes,
    implementation: str,
) -> None: ...
def scan(weights: _Bytes, dtype: str) -> tuple[int, float]: ...
