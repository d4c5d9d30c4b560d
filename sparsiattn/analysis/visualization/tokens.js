// A picture of the tokens: dropped patches are dark, merged patches have their mean colour.
function tokenPicture(block) {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  const [rows, columns] = block.grid, side = 12, place = new Int32Array(bytes, ...block.place);
  canvas.width = columns * side;
  canvas.height = rows * side;
  const cells = document.createElement("canvas"), tiny = cells.getContext("2d");
  cells.width = columns;
  cells.height = rows;
  tiny.imageSmoothingQuality = "high";
  tiny.drawImage(photo, 0, 0, columns, rows);
  const pixels = tiny.getImageData(0, 0, columns, rows).data, groups = new Map();
  place.forEach((token, p) => groups.set(token, [...(groups.get(token) || []), p]));
  context.drawImage(photo, 0, 0, canvas.width, canvas.height);
  for (const [token, patches] of groups) {
    const gone = token < 0 || block.fused.includes(token);
    if (!gone && patches.length === 1) continue;
    const mean = [0, 1, 2].map((c) => patches.reduce((sum, p) => sum + pixels[4 * p + c], 0) / patches.length);
    context.fillStyle = gone ? "rgba(14, 14, 17, 0.86)" : `rgb(${mean.map(Math.round).join()})`;
    for (const p of patches) context.fillRect((p % columns) * side, Math.floor(p / columns) * side, side, side);
  }
  borders(context, place, block, side);
  return canvas;
}

function borders(context, place, block, side) {
  const [rows, columns] = block.grid, count = new Map();
  for (const token of place) count.set(token, (count.get(token) || 0) + 1);
  const merged = (token) => token >= 0 && !block.fused.includes(token) && count.get(token) > 1;
  context.fillStyle = "#fffc";
  for (let p = 0; p < place.length; p++) {
    const x = (p % columns) * side, y = Math.floor(p / columns) * side;
    const right = p % columns + 1 < columns ? p + 1 : -1, below = p + columns < rows * columns ? p + columns : -1;
    const parts = (other) => other >= 0 && place[p] !== place[other] && (merged(place[p]) || merged(place[other]));
    if (parts(right)) context.fillRect(x + side - 0.7, y, 1.4, side);
    if (parts(below)) context.fillRect(x, y + side - 0.7, side, 1.4);
  }
}

function tokens() {
  if (!DATA.tokens.length) return;
  $("tokensection").hidden = false;
  if (DATA.tokens[0].mlp_only) $("tokentitle").textContent = "Tokens that pass through each block's MLP";
  $("tokenhint").textContent = "Dark patches were dropped" + (DATA.tokens.some((b) => b.fused.length) ? " (fused into one token)" : "")
    + "; merged patches show their mean colour, with a line around each group. Blocks that change nothing are left out.";
  const places = DATA.tokens.map((block) => new Int32Array(bytes, ...block.place).join());
  const changed = DATA.tokens.filter((block, i) => places[i] !== places[i - 1]);
  $("tokens").replaceChildren(...changed.map((block) => {
    const figure = document.createElement("figure"), caption = document.createElement("figcaption");
    caption.textContent = `${block.name}: ${block.tokens} of ${block.grid[0] * block.grid[1]}`;
    figure.append(tokenPicture(block), caption);
    return figure;
  }));
}
