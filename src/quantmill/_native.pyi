from _typeshed import ReadableBuffer, WriteableBuffer

def implementations() -> list[tuple[str, str, bool]]: ...
def best() -> str: ...
def quantize(
    weights: ReadableBuffer,
    dtype: str,
    mode: str,
    bits: int,
    group_size: int,
    encode: float,
    codes: WriteableBuffer,
    scales: WriteableBuffer,
    biases: WriteableBuffer,
    implementation: str,
) -> tuple[int, int]: ...
def dequantize(
    codes: ReadableBuffer,
    scales: ReadableBuffer,
    biases: ReadableBuffer,
    dtype: str,
    mode: str,
    bits: int,
    group_size: int,
    values: WriteableBuffer,
    implementation: str,
) -> None: ...
def decode(
    codes: ReadableBuffer,
    scales: ReadableBuffer,
    zeros: ReadableBuffer,
    biases: ReadableBuffer,
    element: str,
    dtype: str,
    columns: int,
    group_columns: int,
    values: WriteableBuffer,
    implementation: str,
) -> None: ...
def search(
    weights: ReadableBuffer,
    dtype: str,
    stored: str,
    mode: str,
    bits: int,
    group_size: int,
    importance: ReadableBuffer,
    first: int,
    codes: WriteableBuffer,
    scales: WriteableBuffer,
    biases: WriteableBuffer,
    implementation: str,
) -> tuple[int, int]: ...
def round_columns(
    mode: str,
    bits: int,
    group_size: int,
    columns: int,
    first: int,
    group: int,
    places: ReadableBuffer,
    scales: ReadableBuffer,
    biases: ReadableBuffer,
    factors: ReadableBuffer,
    errors: WriteableBuffer,
    current: WriteableBuffer,
    codes: WriteableBuffer,
    implementation: str,
) -> None: ...
def carry(
    columns: int,
    first: int,
    last: int,
    to_first: int,
    to_last: int,
    factors: ReadableBuffer,
    errors: ReadableBuffer,
    current: WriteableBuffer,
    implementation: str,
) -> None: ...
def scan(weights: ReadableBuffer, dtype: str) -> tuple[int, float]: ...
