// The bridge between the page and Pannellum; runs as `js_on_load` of a `gr.HTML` (element, trigger, props, watch).
//
// props.value from the page: {panorama: data URL of an equirectangular picture, name, bearing: of its front, or null,
// places: [{label, bfov: [yaw, pitch, x_fov, y_fov]}]}; without `panorama` the one that is shown stays. Yaw and pitch of
// Pannellum are those of the model, because the picture is the whole sphere. To the page: `select` {sample}, a picture to
// show, and `click` {bfov}, a direction to ask about.
const box = element.querySelector(".panorama");
const list = element.querySelector(".places");
const asked = 16; // degrees of the place that a click means
const still = matchMedia("(prefers-reduced-motion: reduce)");
let viewer = null;
let ready = false;
let spots = [];

const ask = (bfov) => trigger("click", { bfov });
const askAbout = ([pitch, yaw]) => ask([yaw, pitch, asked, asked]);
const middle = () => [viewer.getPitch(), viewer.getYaw()];

function button(textContent, onclick, label = textContent) {
  const made = Object.assign(document.createElement("button"), { type: "button", textContent, onclick });
  made.setAttribute("aria-label", label);
  return made;
}

function addSpot(pitch, yaw, cssClass, content) {
  const id = `spot-${spots.length}`;
  spots.push(id);
  viewer.addHotSpot({ id, pitch, yaw, cssClass, createTooltipFunc: (div) => content && div.append(content) });
}

function showPlaces() {
  if (!ready || !props.value.places) return; // while an answer streams, Gradio changes the value in place
  spots.forEach((id) => viewer.removeHotSpot(id));
  spots = [];
  list.replaceChildren();
  props.value.places.forEach(({ label, bfov }, index) => {
    const [yaw, pitch, width, height] = bfov;
    const words = `${label ? `${label}, ` : ""}yaw ${yaw}°, pitch ${pitch}°`;
    addSpot(pitch, yaw, "spot", button(index + 1, () => ask(bfov), `${index + 1}: ask what is at ${words}`));
    for (const [side, end] of width < 360 ? [["left", -1], ["right", 1]] : [])
      for (const [edge, up] of [["top", 1], ["bottom", -1]]) {
        const to = Math.max(-90, Math.min(90, pitch + (up * height) / 2));
        addSpot(to, yaw + (end * width) / 2, `corner ${side} ${edge}`);
      }
    const item = document.createElement("li");
    item.append(button(`${index + 1}: look at ${words}`, () => lookAt(bfov)));
    list.append(item);
  });
  if (props.value.places.length) lookAt(props.value.places[0].bfov);
}

function lookAt([yaw, pitch]) {
  viewer.lookAt(pitch, yaw, viewer.getHfov(), still.matches ? false : 800);
}

async function showPanorama() {
  const { panorama, name, bearing } = props.value;
  if (!panorama) return showPlaces();
  ready = false;
  viewer?.destroy();
  spots = [];
  list.replaceChildren();
  const picture = URL.createObjectURL(await (await fetch(panorama)).blob());
  viewer = pannellum.viewer(box, {
    type: "equirectangular", panorama: picture, autoLoad: true, ignoreGPanoXMP: true, hfov: 100, minHfov: 30,
    doubleClickZoom: false, compass: bearing !== null, northOffset: bearing ?? 0,
  });
  viewer.on("load", () => {
    URL.revokeObjectURL(picture);
    ready = true;
    box.dataset.shown = name;
    showPlaces();
  });
  element.viewer = viewer; // for tests
}

// A click is a press that stays where it is; anything else looks around.
let pressed = null;
const onControl = (event) => event.target.closest(".pnlm-controls-container, .pnlm-compass, button");
box.addEventListener("pointerdown", (event) => { pressed = onControl(event) ? null : event; }, true);
box.addEventListener("pointerup", (event) => {
  const moved = pressed && Math.hypot(event.clientX - pressed.clientX, event.clientY - pressed.clientY);
  if (ready && pressed && moved < 6 && event.timeStamp - pressed.timeStamp < 500)
    askAbout(viewer.mouseEventToCoords(event));
  pressed = null;
}, true);
box.addEventListener("keydown", (event) => {
  if (ready && event.key === "Enter" && event.target === box) askAbout(middle());
});
element.querySelector(".ask-middle").onclick = () => ready && askAbout(middle());
element.querySelectorAll(".samples button").forEach((sample, index) => {
  sample.onclick = () => trigger("select", { sample: index });
});
watch("value", showPanorama);
if (props.value) showPanorama();
