// Runs the one file, off the page's thread. It is asked in turn:
//   { model }                                          -> { provider, inputs }
//   { seed, label, guidance, latent, size }            -> { pixels, shape, seconds, provider }
// and answers { error } where something fails.

import { noise } from "./noise.js";

const provider = () => (gpu ? "WebGPU" : "WebAssembly");
const LIBRARY = "./node_modules/onnxruntime-web/dist/";
let ort, file, gpu, session, shapes;

/** Open a model on the GPU where the browser has one for pages, else in WebAssembly. */
async function open(model) {
  file = model;
  gpu = Boolean(await navigator.gpu?.requestAdapter());
  ort = await import(`${LIBRARY}ort.${gpu ? "webgpu" : "wasm"}.min.mjs`);
  await somewhere(begin);
  return { provider: provider(), inputs: shapes };
}

async function begin() {
  await session?.release();
  const executionProviders = gpu ? ["webgpu", "wasm"] : ["wasm"];
  session = await ort.InferenceSession.create(file, { executionProviders, logSeverityLevel: 3 });
  shapes = Object.fromEntries(session.inputMetadata.map(({ name, shape }) => [name, shape]));
}

/** Draw one picture; of what it is asked for, the model takes what it has inputs for. */
async function draw({ seed, label, guidance, latent, size }) {
  const begun = performance.now();
  const channels = shapes.noise[1];
  const shape = [1, channels, ...latent];
  const tensors = { noise: new ort.Tensor("float32", noise(seed, channels, ...latent), shape) };
  if (shapes.condition) {
    const condition = new Float32Array(shapes.condition[1]);
    if (label !== null) condition[label] = 1;
    tensors.condition = new ort.Tensor("float32", condition, [1, condition.length]);
    tensors.guidance_scale = new ort.Tensor("float32", [guidance], []);
  }
  if (shapes.size) tensors.size = new ort.Tensor("int64", size.map(BigInt), [2]);
  const { pixels } = await session.run(tensors);
  const values = await pixels.getData();
  const seconds = (performance.now() - begun) / 1000;
  return { pixels: values, shape: pixels.dims, seconds, provider: provider() };
}

/** `work`, in WebAssembly where the GPU cannot do it: what a GPU takes differs much. */
async function somewhere(work) {
  try {
    return await work();
  } catch (error) {
    if (!gpu) throw error;
    gpu = false;
    await begin();
    return work();
  }
}

onmessage = async ({ data }) => {
  try {
    postMessage(data.model ? await open(data.model) : await somewhere(() => draw(data)));
  } catch (error) {
    postMessage({ error: String(error.message ?? error) });
  }
};
