// The page of serve.py: chooses the view, and hands the server's models and settings to each.
import { ask, find, say } from "./api.js";
import * as look from "./look.js";
import { drawLegends } from "./tokens.js";
import * as watch from "./watch.js";
import * as write from "./write.js";

const views = [...document.querySelectorAll("[data-view]")];
const chosen = () => views.find(({ dataset }) => `#${dataset.view}` === location.hash) ?? views[0];

function showView() {
  for (const view of views) view.hidden = view !== chosen();
  for (const link of document.querySelectorAll("nav a")) link.ariaCurrent = link.hash === `#${chosen().dataset.view}` ? "page" : null;
  document.title = `${chosen().ariaLabel} · nanohydra`;
  if (chosen().dataset.view === "watch") watch.refresh().catch(say);
}

find("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("api_key", find("key-text").value);
  location.reload();
});

try {
  const served = await ask("page/settings");
  drawLegends();
  write.setUp(served, look.lookAt);
  look.setUp(served);
  watch.setUp(() => chosen().dataset.view === "watch");
  addEventListener("hashchange", showView);
  showView();
} catch (error) {
  say(error);
}
