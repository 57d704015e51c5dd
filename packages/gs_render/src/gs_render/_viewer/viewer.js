// Splat viewer on plain WebGL 2, one file, no dependencies: decode, sort, draw, orbit.
// Drawing follows the Python renderer: same projection, same thresholds, so the picture is the same.
"use strict";
(() => {
  const scene = JSON.parse(document.getElementById("scene").textContent);
  const canvas = document.querySelector("canvas");
  const note = document.getElementById("note");
  const gl = canvas.getContext("webgl2", { antialias: false, alpha: false, powerPreference: "high-performance" });
  if (!gl) {
    note.textContent = "This browser does not offer WebGL 2, which the viewer needs.";
    return;
  }

  // ---- data: uint16 position, uint16 log-scale, uint32 rotation, uint8 rgba, one array after the other

  const TEXELS = 4; // RGBA32F texels of one Gaussian: centre + opacity, covariance (6), colour
  const PER_ROW = 256; // Gaussians in one row of the texture

  function decode() {
    const bytes = Uint8Array.from(atob(scene.data), (c) => c.charCodeAt(0));
    const n = scene.count;
    const position = new Uint16Array(bytes.buffer, 0, 3 * n);
    const scale = new Uint16Array(bytes.buffer, 6 * n, 3 * n);
    const rotation = new Uint32Array(bytes.buffer, 12 * n, n);
    const color = new Uint8Array(bytes.buffer, 16 * n, 4 * n);
    const rows = Math.max(1, Math.ceil(n / PER_ROW));
    const texels = new Float32Array(rows * PER_ROW * TEXELS * 4);
    const centres = new Float32Array(3 * n);
    const [q, s] = [new Float32Array(4), new Float32Array(3)];
    for (let i = 0; i < n; i++) {
      const o = 4 * TEXELS * i;
      for (let a = 0; a < 3; a++) {
        const x = scene.low[a] + ((scene.high[a] - scene.low[a]) * position[3 * i + a]) / 65535;
        centres[3 * i + a] = texels[o + a] = x;
        s[a] = Math.exp(scene.scales[0] + ((scene.scales[1] - scene.scales[0]) * scale[3 * i + a]) / 65535);
        texels[o + 12 + a] = color[4 * i + a] / 255;
      }
      texels[o + 3] = color[4 * i + 3] / 255;
      unpackRotation(rotation[i], q);
      covariance(q, s, texels, o + 4);
    }
    return { n, rows, texels, centres };
  }

  // Two bits name the largest of w x y z, the others follow in 10 bits each.
  function unpackRotation(word, q) {
    const largest = word >>> 30;
    let [sum, shift] = [0, 20];
    for (let i = 0; i < 4; i++) {
      if (i === largest) continue;
      q[i] = (((word >>> shift) & 1023) / 1023 - 0.5) * Math.SQRT2;
      sum += q[i] * q[i];
      shift -= 10;
    }
    q[largest] = Math.sqrt(Math.max(0, 1 - sum));
  }

  // xx xy xz yy yz zz of R S S R^T
  function covariance([w, x, y, z], s, out, o) {
    const r = [
      1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
      2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
      2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y),
    ];
    let k = o;
    for (let a = 0; a < 3; a++)
      for (let b = a; b < 3; b++) {
        let v = 0;
        for (let c = 0; c < 3; c++) v += r[3 * a + c] * s[c] * s[c] * r[3 * b + c];
        out[k++] = v;
      }
  }

  // ---- shaders

  const vertexSource = `#version 300 es
    precision highp float;
    precision highp sampler2D;
    uniform sampler2D data;
    uniform mat3 rotation;      // world to camera, OpenCV axes: x right, y down, z forward
    uniform vec3 translation;
    uniform vec2 size;          // pixels
    uniform float focal, blur, antialias;
    in vec2 corner;
    in uint index;
    out vec2 offset;            // in standard deviations
    out vec4 color;
    void main() {
      gl_Position = vec4(0, 0, 2, 1);  // outside, unless the Gaussian is visible
      ivec2 at = ivec2(int(index % ${PER_ROW}u) * ${TEXELS}, int(index / ${PER_ROW}u));
      vec4 a = texelFetch(data, at, 0), b = texelFetch(data, at + ivec2(1, 0), 0);
      vec4 c = texelFetch(data, at + ivec2(2, 0), 0), d = texelFetch(data, at + ivec2(3, 0), 0);
      vec3 p = rotation * a.xyz + translation;
      if (p.z < 0.01) return;
      vec2 ratio = p.xy / p.z;
      vec2 limit = 0.65 * size / focal;
      vec2 bent = clamp(ratio, -limit, limit);
      mat3 world = mat3(b.x, b.y, b.z, b.y, b.w, c.x, b.z, c.x, c.y);
      mat3 local = rotation * world * transpose(rotation);
      vec3 jx = vec3(1, 0, -bent.x) * focal / p.z, jy = vec3(0, 1, -bent.y) * focal / p.z;
      float xx = dot(jx, local * jx), xy = dot(jx, local * jy), yy = dot(jy, local * jy);
      float area = max(xx * yy - xy * xy, 0.0);
      xx += blur;
      yy += blur;
      float blurred = xx * yy - xy * xy;
      if (blurred <= 0.0) return;
      float opacity = a.w * mix(1.0, sqrt(area / blurred), antialias);
      if (opacity < 1.0 / 255.0) return;
      float middle = 0.5 * (xx + yy);
      float spread = sqrt(max(middle * middle - blurred, 0.0));
      float big = middle + spread, small = max(middle - spread, 1e-6);
      vec2 axis = spread < 1e-6 ? vec2(1, 0) : abs(xy) > 1e-9 ? normalize(vec2(xy, big - xx))
                : xx >= yy ? vec2(1, 0) : vec2(0, 1);
      float reach = sqrt(2.0 * log(255.0 * opacity));
      offset = corner * reach;
      vec2 pixel = ratio * focal + offset.x * sqrt(big) * axis + offset.y * sqrt(small) * vec2(-axis.y, axis.x);
      gl_Position = vec4(pixel * 2.0 / size * vec2(1, -1), 0, 1);
      color = vec4(d.rgb, opacity);
    }`;

  const fragmentSource = `#version 300 es
    precision highp float;
    in vec2 offset;
    in vec4 color;
    out vec4 result;
    void main() {
      float alpha = min(color.a * exp(-0.5 * dot(offset, offset)), 0.999);
      if (alpha < 1.0 / 255.0) discard;
      result = vec4(color.rgb * alpha, alpha);
    }`;

  function compile() {
    const program = gl.createProgram();
    for (const [type, source] of [[gl.VERTEX_SHADER, vertexSource], [gl.FRAGMENT_SHADER, fragmentSource]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.bindAttribLocation(program, 0, "corner");
    gl.bindAttribLocation(program, 1, "index");
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(program));
    return program;
  }

  const { n, rows, texels, centres } = decode();
  let uniforms, indexBuffer;

  function setUp() {
    const program = compile();
    gl.useProgram(program);
    uniforms = {};
    for (const name of ["rotation", "translation", "size", "focal", "blur", "antialias"])
      uniforms[name] = gl.getUniformLocation(program, name);
    gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
    gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA32F, PER_ROW * TEXELS, rows, 0, gl.RGBA, gl.FLOAT, texels);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, gl.NEAREST);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, gl.NEAREST);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    indexBuffer = gl.createBuffer();
    gl.bindBuffer(gl.ARRAY_BUFFER, indexBuffer);
    gl.enableVertexAttribArray(1);
    gl.vertexAttribIPointer(1, 1, gl.UNSIGNED_INT, 0, 0);
    gl.vertexAttribDivisor(1, 1);
    gl.enable(gl.BLEND);
    gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
    gl.clearColor(...scene.background, 1);
  }

  // ---- sorting, back to front: one pass of counting sort over 16-bit depths

  const order = new Uint32Array(n);
  const keys = new Uint16Array(n);
  const depths = new Float32Array(n);
  const starts = new Uint32Array(65537);

  function sort([x, y, z]) {
    let [near, far] = [Infinity, -Infinity];
    for (let i = 0; i < n; i++) {
      const d = (depths[i] = x * centres[3 * i] + y * centres[3 * i + 1] + z * centres[3 * i + 2]);
      if (d < near) near = d;
      if (d > far) far = d;
    }
    const scale = far > near ? 65535 / (far - near) : 0;
    starts.fill(0);
    for (let i = 0; i < n; i++) {
      keys[i] = (far - depths[i]) * scale;
      starts[keys[i] + 1]++;
    }
    for (let k = 0; k < 65536; k++) starts[k + 1] += starts[k];
    for (let i = 0; i < n; i++) order[starts[keys[i]]++] = i;
    gl.bufferData(gl.ARRAY_BUFFER, order, gl.DYNAMIC_DRAW);
  }

  // ---- camera: angles in degrees around a target, z up, azimuth 0 looks from -y

  // A fragment such as #azimuth=90&elevation=0 opens the page with another view.
  const asked = Object.fromEntries([...new URLSearchParams(location.hash.slice(1))].map(([k, v]) => [k, Number(v)]));
  for (const name of ["azimuth", "elevation", "radius"])
    if (Number.isFinite(asked[name])) scene.camera[name] = asked[name];
  const home = () => ({ ...scene.camera, target: [...scene.camera.target] });
  let view = home();
  let sorted = null;

  function axes() {
    const [az, el] = [(view.azimuth * Math.PI) / 180, (view.elevation * Math.PI) / 180];
    const out = [Math.cos(el) * Math.sin(az), -Math.cos(el) * Math.cos(az), Math.sin(el)];
    const right = [Math.cos(az), Math.sin(az), 0];
    const down = [Math.sin(el) * Math.sin(az), -Math.sin(el) * Math.cos(az), -Math.cos(el)];
    return { right, down, forward: out.map((v) => -v), eye: out.map((v, i) => view.target[i] + view.radius * v) };
  }

  const dot = (a, b) => a[0] * b[0] + a[1] * b[1] + a[2] * b[2];

  function draw() {
    waiting = false;
    const ratio = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((v) => Math.max(1, Math.round(v * ratio)));
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const { right, down, forward, eye } = axes();
    if (!sorted || dot(sorted, forward) < 0.99999) sort((sorted = forward));
    gl.viewport(0, 0, width, height);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const matrix = [0, 1, 2].flatMap((i) => [right[i], down[i], forward[i]]); // by columns
    gl.uniformMatrix3fv(uniforms.rotation, false, matrix);
    gl.uniform3f(uniforms.translation, -dot(right, eye), -dot(down, eye), -dot(forward, eye));
    gl.uniform2f(uniforms.size, width, height);
    gl.uniform1f(uniforms.focal, (0.5 * Math.min(width, height)) / Math.tan((view.fov * Math.PI) / 360));
    gl.uniform1f(uniforms.blur, scene.filter);
    gl.uniform1f(uniforms.antialias, scene.antialias ? 1 : 0);
    gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, n);
  }

  let waiting = false;
  function redraw() {
    if (!waiting) requestAnimationFrame(draw);
    waiting = true;
  }

  // ---- mouse, touch, keyboard

  const pointers = new Map();
  const spread = () => {
    const [a, b] = [...pointers.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, distance: Math.hypot(a.x - b.x, a.y - b.y) };
  };

  function turn(dx, dy) {
    view.azimuth -= 0.4 * dx;
    view.elevation = Math.max(-89, Math.min(89, view.elevation + 0.4 * dy));
  }

  function zoom(factor) {
    view.radius = Math.max(0.05 * scene.camera.radius, Math.min(20 * scene.camera.radius, view.radius * factor));
  }

  function move(dx, dy) {
    const { right, down } = axes();
    const unit = (2 * view.radius * Math.tan((view.fov * Math.PI) / 360)) / Math.min(canvas.clientWidth, canvas.clientHeight);
    for (let i = 0; i < 3; i++) view.target[i] -= unit * (dx * right[i] + dy * down[i]);
  }

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    note.style.opacity = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const last = pointers.get(event.pointerId);
    if (!last) return;
    const before = pointers.size === 2 ? spread() : null;
    const [dx, dy] = [event.clientX - last.x, event.clientY - last.y];
    pointers.set(event.pointerId, { x: event.clientX, y: event.clientY });
    if (before) {
      const after = spread();
      zoom(before.distance / Math.max(after.distance, 1));
      move(after.x - before.x, after.y - before.y);
    } else if (event.buttons & 2 || event.shiftKey) move(dx, dy);
    else turn(dx, dy);
    redraw();
  });
  for (const type of ["pointerup", "pointercancel"])
    canvas.addEventListener(type, (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(0.001 * event.deltaY));
    redraw();
  }, { passive: false });
  canvas.addEventListener("contextmenu", (event) => event.preventDefault());
  canvas.addEventListener("dblclick", () => { view = home(); redraw(); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-12, 0], ArrowRight: [12, 0], ArrowUp: [0, 12], ArrowDown: [0, -12] }[event.key];
    if (step) turn(...step);
    else if (event.key === "+" || event.key === "-") zoom(event.key === "+" ? 0.9 : 1 / 0.9);
    else return;
    redraw();
  });
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => { sorted = null; setUp(); redraw(); });
  new ResizeObserver(redraw).observe(canvas);
  setTimeout(() => (note.style.opacity = 0), 6000);

  setUp();
  draw();
})();
