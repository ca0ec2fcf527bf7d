// Which call made which buffer. wgpu leaves the buffers of a browser to the garbage collector, which does not know how large
// they are; here they are destroyed when their call, or the object that holds them, has ended.

/** What a prepared attention holds, by the labels that the crate gives: it outlives the call that made it. */
const HELD = new Set(["params", "workspace", "states", "row_data"]);

/** Marks what WebGPU calls an internal error, which wgpu 30 does not know and would end at. */
export const INTERNAL = "internal error of the browser: ";

export class Ledger {
  /** Whose the buffers are that are made now; set by wasm around each step of a call. */
  owner = 0;
  /** Set by wasm: what the next createBuffer and createCommandEncoder give instead of something new. */
  nextBuffer = undefined;
  nextEncoder = undefined;

  /** The owner of what lasts as long as the device. */
  deviceOwner = 0;

  #last = 0;
  #buffers = new Map();
  #parents = new Map();

  /** A new owner. What lasts longer than it goes to its parent. */
  open(parent = 0) {
    this.#last += 1;
    this.#buffers.set(this.#last, new Set());
    this.#parents.set(this.#last, parent);
    return this.#last;
  }

  /** Destroys what an owner still has. */
  close(owner) {
    const parent = this.#buffers.get(this.#parents.get(owner));
    for (const buffer of this.#buffers.get(owner) ?? []) {
      if (parent && HELD.has(buffer.label)) parent.add(buffer);
      else buffer.destroy();
    }
    this.#buffers.delete(owner);
    this.#parents.delete(owner);
  }

  closeAll() {
    for (const owner of [...this.#buffers.keys()].reverse()) this.close(owner);
  }

  add(owner, buffer) {
    this.#buffers.get(owner)?.add(buffer);
  }

  remove(owner, buffer) {
    this.#buffers.get(owner)?.delete(buffer);
  }

  /** Buffers that are held now, and their bytes. */
  count() {
    let [buffers, bytes] = [0, 0];
    for (const set of this.#buffers.values()) {
      buffers += set.size;
      for (const buffer of set) bytes += buffer.size;
    }
    return { buffers, bytes };
  }

  /** The device as wasm sees it: the same, with every buffer written down. The device itself is not changed. */
  facade(device, info) {
    const ledger = this;
    const methods = new Map();
    const own = {
      adapterInfo: info,
      createBuffer(descriptor) {
        const given = ledger.nextBuffer;
        ledger.nextBuffer = undefined;
        if (given) return given;
        const buffer = device.createBuffer(descriptor);
        ledger.add(ledger.owner, buffer);
        return buffer;
      },
      createCommandEncoder(descriptor) {
        const given = ledger.nextEncoder;
        ledger.nextEncoder = undefined;
        return given ?? device.createCommandEncoder(descriptor);
      },
      async popErrorScope() {
        const error = await device.popErrorScope();
        const known = !error || error instanceof GPUValidationError || error instanceof GPUOutOfMemoryError;
        return known ? error : new GPUValidationError(INTERNAL + error.message);
      },
    };
    return new Proxy(device, {
      get(target, name) {
        if (Object.hasOwn(own, name)) return own[name];
        const value = Reflect.get(target, name, target);
        if (typeof value !== "function") return value;
        if (!methods.has(name)) methods.set(name, value.bind(target));
        return methods.get(name);
      },
      // the handlers of a device are its owner's
      set: () => true,
    });
  }
}
