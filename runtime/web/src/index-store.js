/** Vectors in memory, searched whole, kept in IndexedDB. */

import { ClipError } from "./errors.js";

const DATABASE = "mclip-indexes";

/** @typedef {{key: string, score: number, data: any}} Hit */

export class Index {
  /** @type {Map<string, number>} */
  #places = new Map();
  /** @type {string[]} */
  #keys = [];
  /** @type {any[]} */
  #data = [];
  #vectors = new Float32Array(0);

  /** @param {{model: string, dimension: number}} owner a `Clip`, or what it says of itself */
  constructor({ model, dimension }) {
    if (!Number.isInteger(dimension) || dimension < 1) throw new ClipError(`an index has dimension ${dimension}, expected a whole number above 0`);
    this.model = model;
    this.dimension = dimension;
  }

  get size() {
    return this.#keys.length;
  }

  /** Keys in the order in which they came. */
  get keys() {
    return [...this.#keys];
  }

  /** @param {string} key */
  has(key) {
    return this.#places.has(key);
  }

  /**
   * Add a vector, or replace that of the same key.
   * @param {string} key @param {Float32Array} vector @param {any} [data] anything that can be cloned: a name, a Blob
   * @throws {ClipError} another width, or values that are not finite
   */
  add(key, vector, data = null) {
    if (vector.length !== this.dimension) throw new ClipError(`a vector has ${vector.length} values, this index holds ${this.dimension}; it was made by another model`);
    let norm = 0;
    for (const value of vector) norm += value * value;
    if (!(norm > 0 && norm < Infinity)) throw new ClipError("a vector is zero or not finite; encode the picture again");
    const place = this.#places.get(key) ?? this.#keys.length;
    if ((place + 1) * this.dimension > this.#vectors.length) {
      const larger = new Float32Array(Math.max(64, place * 2) * this.dimension);
      larger.set(this.#vectors);
      this.#vectors = larger;
    }
    const scale = 1 / Math.sqrt(norm);
    for (let d = 0; d < this.dimension; d++) this.#vectors[place * this.dimension + d] = vector[d] * scale;
    this.#keys[place] = key;
    this.#data[place] = data;
    this.#places.set(key, place);
  }

  /** @param {string} key @returns {boolean} whether there was one */
  remove(key) {
    const place = this.#places.get(key);
    if (place === undefined) return false;
    this.#places.delete(key);
    this.#keys.splice(place, 1);
    this.#data.splice(place, 1);
    this.#vectors.copyWithin(place * this.dimension, (place + 1) * this.dimension, (this.size + 1) * this.dimension);
    for (let n = place; n < this.size; n++) this.#places.set(this.#keys[n], n);
    return true;
  }

  /**
   * The nearest by cosine, exactly; equal scores in the order in which they came.
   * @param {Float32Array} query of unit length @param {number} [count] @param {number} [least] score
   * @returns {Hit[]} best first
   */
  search(query, count = 10, least = -Infinity) {
    if (query.length !== this.dimension) throw new ClipError(`a query has ${query.length} values, this index holds ${this.dimension}; it was made by another model`);
    const scores = new Float32Array(this.size);
    for (let n = 0, at = 0; n < scores.length; n++) {
      let sum = 0;
      for (let d = 0; d < this.dimension; d++, at++) sum += query[d] * this.#vectors[at];
      scores[n] = sum;
    }
    const order = Array.from(scores.keys()).filter((n) => scores[n] >= least);
    order.sort((a, b) => scores[b] - scores[a] || a - b);
    return order.slice(0, count).map((n) => ({ key: this.#keys[n], score: scores[n], data: this.#data[n] }));
  }

  /** Keep it in this browser under a name; replaced as a whole or not at all. @param {string} name */
  async save(name) {
    const { model, dimension } = this;
    const vectors = this.#vectors.slice(0, this.size * dimension);
    await inStore("readwrite", (store) => store.put({ model, dimension, keys: this.keys, data: [...this.#data], vectors }, name));
  }

  /**
   * The index saved under a name; null where there is none.
   * @param {string} name @param {{model: string, dimension: number}} owner @returns {Promise<Index | null>}
   * @throws {ClipError} it was made by another model, or is damaged
   */
  static async restore(name, owner) {
    const held = await inStore("readonly", (store) => store.get(name));
    if (held === undefined) return null;
    if (held.model !== owner.model || held.dimension !== owner.dimension) throw new ClipError(`the index '${name}' was made by another model; encode the pictures again`);
    if (!(held.vectors instanceof Float32Array) || held.vectors.length !== held.keys?.length * owner.dimension || held.data?.length !== held.keys.length) {
      throw new ClipError(`the index '${name}' is damaged; delete it and encode the pictures again`);
    }
    const index = new Index(owner);
    held.keys.forEach((/** @type {string} */ key, /** @type {number} */ n) => index.add(key, held.vectors.subarray(n * owner.dimension, (n + 1) * owner.dimension), held.data[n]));
    return index;
  }

  /** @param {string} name */
  static async delete(name) {
    await inStore("readwrite", (store) => store.delete(name));
  }
}

/** @param {IDBTransactionMode} mode @param {(store: IDBObjectStore) => IDBRequest} work @returns {Promise<any>} */
async function inStore(mode, work) {
  const database = await /** @type {Promise<IDBDatabase>} */ (
    new Promise((resolve, reject) => {
      const opening = indexedDB.open(DATABASE, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore("indexes");
      opening.onsuccess = () => resolve(opening.result);
      opening.onerror = () => reject(new ClipError(`this browser keeps nothing for this page (${opening.error?.message}); allow it to store data`));
    })
  );
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction("indexes", mode);
      const request = work(transaction.objectStore("indexes"));
      transaction.oncomplete = () => resolve(request.result);
      transaction.onabort = () => reject(new ClipError(`the index cannot be kept (${transaction.error?.message ?? "stopped"}); free some space`));
    });
  } finally {
    database.close();
  }
}
