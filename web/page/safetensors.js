// Reads a safetensors file: the length of a header, the header as JSON, the tensors.

const SIZES = { F64: 8, F32: 4, F16: 2, BF16: 2, I64: 8, I32: 4, U32: 4, U8: 1, I8: 1, BOOL: 1 };

export class FileError extends Error {}

/** Names and metadata, with functions that read a tensor. */
export function parse(buffer) {
  if (buffer.byteLength < 8) throw new FileError(`the file has ${buffer.byteLength} bytes; a safetensors file has 8 at least`);
  const length = new DataView(buffer).getBigUint64(0, true);
  if (length > BigInt(buffer.byteLength - 8)) {
    throw new FileError(`this is no safetensors file: its header would take ${length} bytes of ${buffer.byteLength}`);
  }
  const start = 8 + Number(length);
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(buffer, 8, Number(length))));
  } catch (error) {
    throw new FileError(`this is no safetensors file: its header is no JSON (${error.message})`);
  }
  const { __metadata__: metadata = {}, ...tensors } = header;
  for (const [name, tensor] of Object.entries(tensors)) {
    const { dtype, shape, data_offsets: offsets } = tensor ?? {};
    const sound = Array.isArray(shape) && shape.every((n) => Number.isSafeInteger(n) && n >= 0) && Array.isArray(offsets) && offsets.length === 2;
    if (!sound) throw new FileError(`the header's entry of ${name} is not sound`);
    const bytes = shape.reduce((all, n) => all * n, 1) * (SIZES[dtype] ?? 0);
    const [from, to] = offsets;
    if (!Number.isSafeInteger(from) || !Number.isSafeInteger(to) || from < 0 || to < from || start + to > buffer.byteLength) {
      throw new FileError(`${name} lies outside of the file; it may be cut short`);
    }
    if (SIZES[dtype] && to - from !== bytes) throw new FileError(`${name} takes ${to - from} bytes, its shape [${shape}] in ${dtype} needs ${bytes}`);
  }
  const part = (name) => {
    const [from, to] = tensors[name].data_offsets;
    return buffer.slice(start + from, start + to);
  };
  return {
    metadata,
    names: Object.keys(tensors),
    has: (name) => Object.hasOwn(tensors, name),
    shape: (name) => tensors[name].shape,
    /** F32 as floats, F16 as its bits. */
    numbers(name) {
      const { dtype } = tensors[name];
      if (dtype === "F32") return new Float32Array(part(name));
      if (dtype === "F16") return new Uint16Array(part(name));
      throw new FileError(`${name} is ${dtype}; needs F32 or F16`);
    },
    bytes(name) {
      const { dtype } = tensors[name];
      if (dtype === "BOOL" || dtype === "U8") return new Uint8Array(part(name));
      throw new FileError(`${name} is ${dtype}; needs BOOL`);
    },
    counts(name) {
      const { dtype } = tensors[name];
      if (dtype === "U32" || dtype === "I32") return new Uint32Array(part(name));
      if (dtype === "I64") return Uint32Array.from(new BigInt64Array(part(name)), Number);
      throw new FileError(`${name} is ${dtype}; needs I64, I32 or U32`);
    },
  };
}

export async function fetched(url) {
  const response = await fetch(url);
  if (!response.ok) throw new FileError(`${url}: ${response.status} ${response.statusText}`);
  return parse(await response.arrayBuffer());
}
